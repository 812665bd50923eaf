"""The training loop. Run by Ray Train's workers, by torchrun, or in this process, always through `train`.

torchrun --nproc-per-node 2 -m dcgan.train RUN      goes on with the run in the directory RUN
"""

import json
import logging
import math
import os
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcgan import checkpoint, distributed, models, pictures, storage, wasserstein
from dcgan.config import Model
from dcgan.data import batches
from dcgan.data.batches import Batches, normalise
from dcgan.data.store import Store
from dcgan.distributed import Place
from dcgan.run import Run, read_lines
from dcgan.step import Game

log = logging.getLogger(__name__)

COLLAPSED_LOSS = 0.05  # D's loss below this, or D(real) - D(fake) above 0.95: the generator gets no gradient
COLLAPSED_GAP = 0.95
GRID = 64  # images in a sample grid, eight a row; a conditional net draws one row a class
DRAW_BATCH = 256  # images generated at a time outside training


class DivergedError(RuntimeError):
    """A loss or gradient is no longer finite; the message gives the step and what went wrong."""


def train(run: Run) -> None:
    """Train a run from its newest checkpoint, or from the start, to `train.steps`. Every rank calls this.

    Rank 0 writes metrics, samples, checkpoints and events into the run; interrupted at any line, the same call goes on.
    Raises DivergedError, BusyError, IncompatibleError, CorruptError if a byte of the images is not as stored, or
    ValueError for settings that don't fit them.
    """
    settings = run.experiment.train
    with distributed.join(run.experiment.compute.device) as place, run.lock() if place.first else nullcontext():
        # Announce what this run is.
        store = run.store(verify=place.first)
        data = Batches(store, store.training, settings.batch_size, settings.seed, place)
        game = _start(run, store, place)
        newest = checkpoint.latest(run) if place.first else None
        start = _resume(run, game, newest, place)
        if place.first:
            log.info("run %s: steps %d to %d, %s", run.name, start, settings.steps, _describe(game, data, place))
            _cut(run, start)
        if start >= settings.steps:
            return

        # Prepare what stays the same: the z of the grids, and the images that a checkpoint is compared with.
        window = Window(start, settings.batch_size, place)
        writer = checkpoint.Writer(run) if place.first else None
        if start == 0:
            _draw_grid(run, game, store, 0, place)

        # Play.
        with closing(data.from_step(start)) as stream, closing(writer) if writer else nullcontext():
            for step, (images, labels) in zip(range(start, settings.steps), stream, strict=False):
                z = _noise(run, settings.batch_size, step, place)
                real = normalise(images, settings.channels_last)
                window.add(game.step(step, real, labels if run.experiment.model.conditional else None, z))

                # After a step: read the metrics now and then, and keep what is worth keeping.
                done = step + 1
                saving = done % settings.checkpoint_every == 0 or done == settings.steps
                drawing = done % settings.sample_every == 0 or done == settings.steps
                if saving or drawing:
                    for net in (game.generator, game.discriminator, game.sampler):
                        distributed.average_buffers(net, place)
                if saving or done % settings.log_every == 0:
                    line = window.close(done)  # on every rank: it is a collective
                    _refuse_non_finite(run, line, place)
                    if writer is not None:
                        if saving:
                            line["swd"] = _validate(run, game, store, place)
                        _append(run.path / "metrics.jsonl", line)  # before the checkpoint, or a kill here loses it
                        window.warn_of_collapse(run, line)
                        if saving:
                            writer.save(checkpoint.snapshot(game, done, run, store), line["swd"])
                    window.restart()
                if drawing:
                    _draw_grid(run, game, store, done, place)


class Window:
    """Sums of the metrics since the last line, on the device: nothing waits for the device between lines."""

    def __init__(self, start: int, batch_size: int, place: Place) -> None:
        self.batch_size, self.place, self.collapsed = batch_size, place, False
        self.last, self.began = start, time.perf_counter()
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def close(self, done: int) -> dict[str, Any]:
        """The line for the steps since the last one: means over steps and ranks, and the speed."""
        names = sorted(self.sums)
        means = torch.stack([self.sums[name].float() / self.counts[name] for name in names])
        values = distributed.mean(means, self.place).tolist()  # the only wait for the device
        seconds = time.perf_counter() - self.began
        images = done * self.batch_size
        speed = (done - self.last) * self.batch_size / seconds
        self.last = done
        line = {"step": done, "images": images, "images_per_second": speed, "seconds": seconds}
        return line | dict(zip(names, values, strict=True))

    def restart(self) -> None:
        """Begin the next line; the time since `close` (validation, copying) is no training time."""
        self.sums.clear()
        self.counts.clear()
        self.began = time.perf_counter()

    def warn_of_collapse(self, run: Run, line: dict[str, Any]) -> None:
        """Record the moment at which the discriminator wins outright, once each time it happens."""
        collapsed = line.get("d_loss", math.inf) < COLLAPSED_LOSS
        collapsed |= line.get("d_real", 0.0) - line.get("d_fake", 1.0) > COLLAPSED_GAP
        if collapsed and not self.collapsed:
            message = (
                f"the discriminator has won: loss {line['d_loss']:.3f}, D(real) {line['d_real']:.2f}, "
                f"D(fake) {line['d_fake']:.2f}; the generator learns nothing from here unless it recovers"
            )
            _record(run, line["step"], "collapse", message)
        self.collapsed = collapsed


def _start(run: Run, store: Store, place: Place) -> Game:
    experiment = run.experiment
    if store.size != experiment.data.size:
        raise ValueError(f"the store's images have {store.size} px, the experiment's {experiment.data.size}")
    nets = models.build(
        experiment.model, store.channels, len(store.classes), experiment.data.size, experiment.train.seed
    )
    return Game(*nets, experiment.train, place)


def _resume(run: Run, game: Game, newest: Path | None, place: Place) -> int:
    """Load the checkpoint that rank 0 found valid, on every rank; the step to go on from, 0 if there is none."""
    step = int(newest.name) if newest is not None else 0
    if place.world > 1:
        shared = torch.tensor([step], device=place.device)
        torch.distributed.broadcast(shared, 0)
        step = int(shared)
    if step == 0:
        return 0
    return checkpoint.restore(game, run.checkpoints / str(step), run)


def _cut(run: Run, step: int) -> None:
    """Drop lines written after the checkpoint that training goes on from: those steps will be played again."""
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = read_lines(run.path / name)
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
        if lines:
            storage.write_bytes(run.path / name, kept.encode())


def _describe(game: Game, data: Batches, place: Place) -> str:
    sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (game.generator, game.discriminator)]
    return (
        f"{data.count:,} images, batch {data.batch_size} as {place.world} x {data.share} on {place.device}, "
        f"generator {sizes[0]:.2f} M and discriminator {sizes[1]:.2f} M parameters"
    )


def _noise(run: Run, count: int, step: int, place: Place) -> Tensor:
    """This rank's rows of a step's z."""
    model = run.experiment.model
    z = batches.noise(model.z, (count, model.z_dim), run.experiment.train.seed, step)
    rows = distributed.share(count, place.world)
    return torch.from_numpy(z[place.rank * rows : (place.rank + 1) * rows]).to(place.device, non_blocking=True)


def fixed_noise(model: Model, classes: int, count: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """z (n, z_dim) and labels (n,) of a grid: `count` images, or, conditional, that many a class in turn."""
    rows = count if not model.conditional else classes * count
    z = torch.from_numpy(batches.noise(model.z, (rows, model.z_dim), seed, 2**63))  # a step that training never reaches
    return z, torch.arange(classes).repeat_interleave(count) if model.conditional else None


@torch.no_grad()
def draw(net: models.Generator, z: Tensor, labels: Tensor | None) -> Tensor:
    """Images (n, C, H, W) float32 in [-1, 1] on the CPU, by BatchNorm's running statistics; the net's mode is kept."""
    was_training, device = net.training, next(net.parameters()).device
    net.eval()
    parts = []
    for start in range(0, len(z), DRAW_BATCH):
        part = slice(start, start + DRAW_BATCH)
        parts.append(net(z[part].to(device), labels[part].to(device) if labels is not None else None).float().cpu())
    net.train(was_training)
    return torch.cat(parts)


def _draw_grid(run: Run, game: Game, store: Store, step: int, place: Place) -> None:
    if not place.first:
        return
    model, classes = run.experiment.model, len(store.classes)
    columns = 8
    z, labels = fixed_noise(model, classes, columns if model.conditional else GRID, run.experiment.train.seed)
    images = pictures.to_uint8(draw(game.sampler, z, labels).numpy())
    pictures.write_png(run.samples / f"{step:08d}.png", pictures.grid(images, columns))


def _validate(run: Run, game: Game, store: Store, place: Place) -> float:
    """Sliced Wasserstein distance between training images and as many drawn from fixed z."""
    available = store.count(*store.training)
    count = min(wasserstein.IMAGES, available)
    rows = np.sort(batches.permutation(available, run.experiment.train.seed, 0)[:count])
    source = Batches(store, store.training, count, 0, Place(0, 1, torch.device("cpu")))
    labels = torch.from_numpy(source.labels[rows]) if run.experiment.model.conditional else None
    model = run.experiment.model
    z = torch.from_numpy(batches.noise(model.z, (count, model.z_dim), run.experiment.train.seed, 2**63))
    real = normalise(torch.from_numpy(source.gather(rows)), channels_last=False)
    return wasserstein.distance(real.to(place.device), draw(game.sampler, z, labels).to(place.device))


def _refuse_non_finite(run: Run, line: dict[str, Any], place: Place) -> None:
    wrong = [name for name, value in line.items() if not math.isfinite(value)]
    if not wrong:
        return
    message = f"{', '.join(wrong)} not finite in the steps up to {line['step']}; the last checkpoint is kept"
    if place.first:
        _record(run, line["step"], "non_finite", message)
    raise DivergedError(f"run {run.name}: {message}")


def _record(run: Run, step: int, event: str, message: str) -> None:
    log.warning("step %d: %s", step, message)
    _append(run.path / "events.jsonl", {"step": step, "event": event, "message": message})


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(Run.open(Path(sys.argv[1])))
