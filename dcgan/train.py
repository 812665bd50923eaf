"""The training loop. Run by Ray Train's workers, by torchrun, or in this process, always through `train`.

torchrun --nproc-per-node 2 -m dcgan.train RUN      resumes the run in the directory RUN
"""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch

from dcgan import checkpoint, distributed, memory, models, preemption, storage
from dcgan.config import is_for_users
from dcgan.data.batches import Batches
from dcgan.data.store import Store
from dcgan.distributed import Place
from dcgan.keeper import Keeper, Line
from dcgan.player import Player
from dcgan.run import Run, read_lines
from dcgan.step import Game

log = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """A loss or gradient is no longer finite; the message gives the step and what went wrong."""


class StoppedError(RuntimeError):
    """Training was asked to end, and kept a checkpoint of the step that the message gives."""


def train(run: Run) -> None:
    """Train a run from its newest checkpoint, or from the start, to `train.steps`. Every rank calls this.

    Rank 0 writes metrics, samples, checkpoints and events into the run; interrupted at any line, the same call resumes.
    Raises DivergedError, StoppedError, BusyError, IncompatibleError, CorruptError if a byte of the images is not as
    stored, or ValueError for settings that don't fit them.
    """
    settings = run.experiment.train
    memory.keep()
    with distributed.join(run.experiment.compute.device) as place, run.lock() if place.first else nullcontext():
        # Announce what this run is.
        # Each rank compares a share of the bytes: the others would not wait for one to read hundreds of GB.
        store = run.store(verify=True, share=(place.rank, place.world))
        data = Batches(store, store.training, settings.batch_size, settings.seed, place, run.experiment.model)
        game = _start(run, store, place)
        newest = checkpoint.latest(run) if place.first else None
        start = _resume(run, game, newest, place)
        if place.first:
            log.info("run %s: steps %d to %d, %s", run.name, start, settings.steps, _describe(game, data, place))
            _cut(run, start)
        if start >= settings.steps:
            return

        # Draw a grid before the first step.
        player, window = Player(game, run.experiment.compute.graph), Window(start, settings.batch_size, place)
        keeper, is_asked = Keeper(run, game, store) if place.first else None, preemption.Request(run, place)
        with closing(player), closing(data.from_step(start)) as stream, closing(keeper) if keeper else nullcontext():
            if start == 0 and keeper is not None:
                with window.paused():
                    keeper.keep(0, line=None, drawing=True)

            # Train.
            for step, batch in zip(range(start, settings.steps), stream, strict=False):
                if keeper is not None and player.settling(step):
                    keeper.wait()
                player.play(step, batch)

                # After a step: read the metrics now and then, and keep what is due.
                done = step + 1
                due = done % settings.checkpoint_every == 0
                stopping = is_asked(waiting=due or done % settings.log_every == 0)
                saving = due or done == settings.steps or stopping
                drawing = done % settings.sample_every == 0 or done == settings.steps
                line = None
                if saving or drawing:
                    for net in (game.generator, game.discriminator, game.sampler):
                        distributed.average_buffers(net, place)
                if saving or done % settings.log_every == 0:
                    line = window.close(done, player)  # on every rank: it is a collective
                    _refuse_non_finite(run, line, keeper)
                if keeper is not None and (line is not None or drawing):
                    with window.paused():
                        keeper.keep(done, line, saving, drawing)
                if stopping:
                    break
        distributed.barrier(place)  # a rank that ended first would have torchrun kill the one still writing
    if done < settings.steps:
        raise StoppedError(f"run {run.name} was stopped at step {done}, which is kept; the same command continues")


class Window:
    """The lines of metrics: means over the steps since the last line, and the speed in the time that was not paused."""

    def __init__(self, start: int, batch_size: int, place: Place) -> None:
        self.batch_size, self.place = batch_size, place
        self.last, self.began = start, time.perf_counter()

    def close(self, done: int, player: Player) -> Line:
        """The line for the steps since the last one, means over all ranks; the next one begins."""
        names = sorted(player.counts)
        means = torch.stack([player.sums[name] / player.counts[name] for name in names])
        values = distributed.mean(means, self.place).tolist()  # the only wait for the device
        seconds = time.perf_counter() - self.began
        images = done * self.batch_size
        speed = (done - self.last) * self.batch_size / seconds
        player.restart()
        self.last, self.began = done, time.perf_counter()
        line = {"step": done, "images": images, "images_per_second": speed, "seconds": seconds}
        return line | dict(zip(names, values, strict=True))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What the body does (drawing, validation, copying) does not count as training time."""
        since = time.perf_counter()
        yield
        self.began += time.perf_counter() - since


def _start(run: Run, store: Store, place: Place) -> Game:
    experiment = run.experiment
    if store.size != experiment.data.size:
        raise ValueError(f"the store's images have {store.size} px, the experiment's {experiment.data.size}")
    nets = models.build(
        experiment.model, store.channels, len(store.classes), experiment.data.size, experiment.train.seed
    )
    return Game(*nets, experiment.train, place)


def _resume(run: Run, game: Game, newest: Path | None, place: Place) -> int:
    """Load the checkpoint that rank 0 found valid, on every rank; returns the step to resume from, 0 if none."""
    step = int(newest.name) if newest is not None else 0
    if place.world > 1:
        shared = torch.tensor([step], device=place.device)
        torch.distributed.broadcast(shared, 0)
        step = int(shared)
    if step == 0:
        return 0
    return checkpoint.restore(game, run.checkpoints / str(step), run)


def _cut(run: Run, step: int) -> None:
    """Drop lines written after the checkpoint that training resumes from: those steps will be repeated."""
    for name in ("metrics.jsonl", "events.jsonl"):
        kept = "".join(json.dumps(line) + "\n" for line in read_lines(run.path / name) if line["step"] <= step)
        if (run.path / name).is_file():  # even with no whole line in it: a part of one would spoil the next
            storage.write_bytes(run.path / name, kept.encode())


def _refuse_non_finite(run: Run, line: Line, keeper: Keeper | None) -> None:
    wrong = [name for name, value in line.items() if not math.isfinite(value)]
    if not wrong:
        return
    message = f"{', '.join(wrong)} not finite in the steps up to {line['step']}; the last checkpoint is kept"
    if keeper is not None:
        keeper.event(line["step"], "non_finite", message)
    raise DivergedError(f"run {run.name}: {message}")


def _describe(game: Game, data: Batches, place: Place) -> str:
    sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (game.generator, game.discriminator)]
    numbers = ", ".join(str(part).removeprefix("torch.") for part in game.numerics)
    return (
        f"{data.count:,} images, batch {data.batch_size} as {place.world} x {data.share} on {place.device}, {numbers}, "
        f"generator {sizes[0]:.2f} M and discriminator {sizes[1]:.2f} M parameters"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        opened = Run.open(Path(sys.argv[1]))
        with preemption.awaited(opened):
            train(opened)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command continues from here\n")
        sys.exit(130)  # as `dcgan train` does
    except (ValueError, OSError, RuntimeError) as error:
        if not (is_for_users(error) or isinstance(error, DivergedError | StoppedError)):  # which are of __main__ here
            raise
        sys.exit(f"error: {error}")
