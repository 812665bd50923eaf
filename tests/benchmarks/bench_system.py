"""What the system adds to the bare loop: python tests/benchmarks/bench_system.py [--help]

Bare: batches of a store of 50,000 random images through the step, nothing else. System: the same steps as `dcgan train`
has them: a Ray Train worker, lines of metrics every 50 steps, MLflow, moving average, and every 1,000 steps a sample
grid and a checkpoint with its distance. Both are processes started here, and take turns of a fortieth of the steps: who
is not in turn is stopped (SIGSTOP) with all its processes, so that both meet the same machine and pay the same for it.
The first steps of a turn are not counted: what was stopped has to catch up. First the parts, each measured alone.
"""

import argparse
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_step import wait
from fabricated import write_store

from dcgan import checkpoint, environment, keeper, memory, models, train
from dcgan import stages as pipeline
from dcgan.config import Experiment, validate
from dcgan.data.batches import Batches
from dcgan.data.store import Description, Store
from dcgan.distributed import Place
from dcgan.player import Player
from dcgan.run import Run
from dcgan.step import Game

TURNS = 40
ELSEWHERE = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")  # what would run on servers that are not stopped in between
UNCOUNTED = 2  # steps of a turn: by hand at 034cf2e, the first took 12 % more in the system, the second 7, the others 5


def make_store(home: Path, size: int, images: int) -> None:
    rng = np.random.default_rng(0)
    pixels = [(rng.integers(0, 256, (3, size, size), np.uint8), i % 10) for i in range(images)]
    write_store(
        home, Description("random", tuple("0123456789"), size, 3, "none"), {"train": pixels, "test": pixels[:9]}
    )


def experiment(home: Path, size: int, steps: int, seed: int, device: str) -> Experiment:
    """As the preset cifar10 has it, with a moving average; a seed makes it a run of its own."""
    every = {"log_every": 50, "sample_every": 1000, "checkpoint_every": 1000}
    return validate(
        {
            "data": {"name": "cifar10", "size": size, "home": home},
            "model": {"kernel": 4, "width": 64, "z": "normal"},
            "train": {"steps": steps, "seed": seed, "ema": 0.999, **every},
            "compute": {"workers": 1, "device": device},
        }
    )


def open_run(home: Path, size: int, steps: int, seed: int, device: str) -> Run:
    store = Store.open(home, next(path.name for path in (home / "stores").iterdir() if len(path.name) == 16))
    return Run.create(experiment(home, size, steps, seed, device), store)


def place_of(run: Run) -> Place:
    cuda = torch.cuda.is_available() and run.experiment.compute.device != "cpu"
    return Place(0, 1, torch.device("cuda" if cuda else "cpu"))


def new_game(run: Run, place: Place, ema: float) -> Game:
    settings = run.experiment.train.model_copy(update={"ema": ema})
    nets = models.build(run.experiment.model, 3, 10, run.experiment.data.size, settings.seed)
    return Game(*nets, settings, place)


def loop(run: Run) -> Iterator[None]:
    """The steps alone; yields after each."""
    memory.keep()
    torch.set_num_threads(environment.cpus())  # as a Ray worker has them
    place, settings, store = place_of(run), run.experiment.train, run.store()
    player = Player(new_game(run, place, 0.0), run.experiment.compute.graph)
    data = Batches(store, store.training, settings.batch_size, settings.seed, place, run.experiment.model)
    with closing(data.from_step(0)) as batches:
        for step, batch in zip(range(settings.steps), batches, strict=False):
            player.play(step, batch)
            yield
    [value.item() for value in player.sums.values()]  # waits for the device


def bare(run: Run) -> None:
    for _ in loop(run):
        pass


def in_turns(run: Run, side: str, work: Callable[[Run], None]) -> None:
    """Do `work`, which plays all steps: after each of TURNS turns, write its seconds and wait until the next may begin.

    The last turn ends with `work`: of the system's, with its last checkpoint on disk.
    """
    play, began = Player.play, 0.0
    turn = run.experiment.train.steps // TURNS

    def write() -> None:
        (run.path / f"{side}.pipe").write_text(f"{time.perf_counter() - began}\n")

    def in_turn(self: Player, step: int, batch: Any) -> None:
        nonlocal began
        if step and step % turn == 0:
            [value.item() for value in self.sums.values()]
            write()
            while not (run.path / f"{side}-{step // turn}").exists():
                time.sleep(0.005)
        if step % turn == UNCOUNTED:
            [value.item() for value in self.sums.values()]
            began = time.perf_counter()
        play(self, step, batch)

    Player.play = in_turn  # type: ignore[method-assign]
    work(run)
    write()


def system(run_path: str) -> None:
    """What a Ray Train worker does."""
    in_turns(Run.open(Path(run_path)), "system", train.train)


class Side:
    """`bare`, or a run as `dcgan train` has it, in a process with all that it starts: Ray's servers, worker, MLflow."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name, self.turns = run, name, 0
        os.mkfifo(run.path / f"{name}.pipe")
        self.pipe = os.open(run.path / f"{name}.pipe", os.O_RDWR)  # for writing, too: or it would end with each writer
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--run", str(run.path), "--side", name],
            env={key: value for key, value in os.environ.items() if key not in ELSEWHERE},
            start_new_session=True,  # the kernel hangs up a session that loses its shell while some of it is stopped
        )

    def turn(self) -> float:
        """Seconds of its next turn, at whose end all its processes are stopped."""
        if self.turns:
            (self.run.path / f"{self.name}-{self.turns}").touch()
            self._signal(signal.SIGCONT)
        while not select.select([self.pipe], [], [], 1)[0]:  # whoever looks more often slows what it waits for
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended after {self.turns} of {TURNS} turns")
        seconds = float(os.read(self.pipe, 100))
        self._signal(signal.SIGSTOP)
        self.turns += 1
        return seconds

    def close(self) -> None:
        """Let it end by itself after its last turn, and kill it before."""
        self._signal(signal.SIGCONT if self.turns == TURNS else signal.SIGKILL)
        self.process.wait()
        os.close(self.pipe)

    def _signal(self, number: int) -> None:
        for process in family(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(process, number)


def family(process: int) -> list[int]:
    """A process and all that it and its children have started, but for children of one that has ended."""
    children = defaultdict(list)
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            children[int(stat(directory)[1])].append(int(directory.name))
    found = [process]
    for one in found:
        found += children[one]
    return found


def stat(directory: Path) -> list[str]:
    """The fields of a process's `stat` after its name: state, parent, ..."""
    return (directory / "stat").read_text().rpartition(")")[2].split()


def processor_seconds(process: int) -> dict[str, float]:
    """Processor time so far of the process and its family, by name."""
    ticks = os.sysconf("SC_CLK_TCK")
    found: dict[str, float] = defaultdict(float)
    for one in family(process):
        directory = Path("/proc", str(one))
        with suppress(FileNotFoundError, ProcessLookupError):
            words = (directory / "cmdline").read_text().split("\0")
            name = next((word for word in words[:3] if not word.startswith("-") and "python" not in word), words[0])
            fields = stat(directory)
            found[Path(name).name.partition(".")[0]] += (int(fields[11]) + int(fields[12])) / ticks
    return found


def stages(run: Run, steps: int = 20) -> dict[str, float]:
    """Milliseconds a step of its stages, the device waited for after each and nothing recorded as a graph."""
    place, settings = place_of(run), run.experiment.train
    game, store = new_game(run, place, 0.0), run.store()
    player = Player(game, graph=False)
    spent: dict[str, float] = defaultdict(float)

    def timed(stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            wait(place.device)
            began = time.perf_counter()
            result = work(*arguments)
            wait(place.device)
            spent[stage] += 1e3 * (time.perf_counter() - began) / steps
            return result

        return call

    for stage, owner, name in (
        ("G forward", game, "_generate"),
        ("D", game, "_update_discriminator"),
        ("G", game, "_update_generator"),
        ("D optimizer", game.d_optimizer, "step"),
        ("G optimizer", game.g_optimizer, "step"),
    ):
        setattr(owner, name, timed(stage, getattr(owner, name)))
    data = Batches(store, store.training, settings.batch_size, settings.seed, place, run.experiment.model)
    with closing(data.from_step(0)) as stream:
        take = timed("input", stream.__next__)
        for step in range(-5, steps):
            if step == 0:
                spent.clear()
            player.play(step + 5, take())
    return {
        "input": spent["input"],
        "discriminator": spent["D"] - spent["D optimizer"],
        "generator": spent["G forward"] + spent["G"] - spent["G optimizer"],
        "optimizers": spent["D optimizer"] + spent["G optimizer"],
    }


def parts(run: Run, repeats: int = 5) -> dict[str, float]:
    """Milliseconds of each thing that a run does beside its steps."""
    place = place_of(run)
    game = new_game(run, place, 0.999)
    keep = keeper.Keeper(run, game, run.store())
    state = checkpoint.snapshot(game, 1, run, run.store())
    began = time.perf_counter()
    keep._distance()
    first = 1e3 * (time.perf_counter() - began)
    works = {
        "moving average, a step": game._update_average,
        "a line on disk": lambda: keeper.append(run.path / "scratch.jsonl", {"step": 1}),
        "a sample grid": lambda: keep._grid(1),
        "copy of the nets for a checkpoint": lambda: checkpoint.snapshot(game, 1, run, run.store()),
        "distance of a checkpoint": keep._distance,
        "a checkpoint on disk, beside the steps": lambda: keep._writer._write(checkpoint.to_cpu(state), 1.0),
    }
    found = {}
    for name, work in works.items():
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            if place.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        found[name] = 1e3 * statistics.median(times)
    keep.close()
    found["the training images' side of the distance, once"] = first - found["distance of a checkpoint"]
    return found


def compare(home: Path, size: int, steps: int, device: str) -> dict[str, Any]:
    """Seconds of each turn of the bare loop and of the system's; who is not in turn is stopped, with all its processes.

    "beside": the processor seconds that each of the system's processes took a second in which they ran; their timers
    also fire for the time in which they were stopped. Raises ValueError if the steps are no multiple of TURNS, or too
    few.
    """
    if steps % TURNS or steps <= UNCOUNTED * TURNS:
        raise ValueError(f"{steps} steps: a multiple of {TURNS} above {UNCOUNTED * TURNS} is needed")
    run = open_run(home, size, steps, 0, device)
    with ExitStack() as stack:
        sides, turns = [], {}
        for name in ("bare", "system"):
            sides.append(Side(run, name))
            stack.callback(sides[-1].close)
            turns[name] = [sides[-1].turn()]
        before = processor_seconds(sides[1].process.pid)
        seconds = 0.0  # that the system ran: its turns with the steps of them that are not counted
        for _ in range(TURNS - 1):
            for side in sides:
                began = time.perf_counter()
                turns[side.name].append(side.turn())
                seconds += (time.perf_counter() - began) * (side.name == "system")
            print(f"{turns['bare'][-1]:.2f} s bare, {turns['system'][-1]:.2f} s system", flush=True)
        after = processor_seconds(sides[1].process.pid)
    beside = {name: (spent - before.get(name, 0.0)) / seconds for name, spent in after.items()}
    return {"steps": steps, **turns, "beside": dict(sorted(beside.items(), key=lambda item: -item[1]))}


def added(found: dict[str, Any]) -> tuple[float, float]:
    """By which share the system's turns are longer than the bare loop's, and 1.96 standard errors over the pairs.

    The last turn, which alone has a grid and a checkpoint, counts for the share and not for its error.
    """
    bare, system = found["bare"], found["system"]
    usual = sum(system[:-1]) / sum(bare[:-1]) - 1
    rest = [theirs - (1 + usual) * ours for theirs, ours in zip(system[:-1], bare[:-1], strict=True)]
    return sum(system) / sum(bare) - 1, 1.96 * statistics.stdev(rest) * len(rest) ** 0.5 / sum(bare[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1000, help=f"a multiple of {TURNS}, at least {3 * TURNS}")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # of the process of a Side
    parser.add_argument("--side", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side == "bare":
        in_turns(Run.open(chosen.run), "bare", bare)
        return
    if chosen.side == "system":
        pipeline.train_here = system
        pipeline.train(Run.open(chosen.run))
        return
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        make_store(home, chosen.size, 50_000)
        run = open_run(home, chosen.size, chosen.steps, 10**6, chosen.device)
        for name, milliseconds in (stages(run) | parts(run)).items():
            print(f"{name}: {milliseconds:.2f} ms", flush=True)
        found = compare(home, chosen.size, chosen.steps, chosen.device)
        for name, share in found["beside"].items():
            print(f"{name}: {100 * share:.2f} % of a processor")
        share, error = added(found)
        print(f"the system adds {100 * share:.2f} +- {100 * error:.2f} % to {chosen.steps:,} steps")


if __name__ == "__main__":
    main()
