"""What the system adds to the bare loop: python tests/benchmarks/bench_system.py [--help]

Bare: batches of a store of 50,000 random images through the step, nothing else, in this process. System: the same steps
as a run has them, in a Ray Train worker: lines of metrics every 50 steps, moving average, sample grid, and a checkpoint
with its distance. Both in turn; a pair's ratio is that of the seconds from the first step to the end of the last, the
last checkpoint on disk. First the parts of it, each measured alone.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_step import wait
from fabricated import write_store

from dcgan import checkpoint, cluster, keeper, models, train
from dcgan.config import Experiment, validate
from dcgan.data.batches import Batches
from dcgan.data.store import Description
from dcgan.distributed import Place
from dcgan.player import Player
from dcgan.run import Run
from dcgan.step import Game


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
    from dcgan.data.store import Store

    store = Store.open(home, next(path.name for path in (home / "stores").iterdir() if len(path.name) == 16))
    return Run.create(experiment(home, size, steps, seed, device), store)


def place_of(run: Run) -> Place:
    cuda = torch.cuda.is_available() and run.experiment.compute.device != "cpu"
    return Place(0, 1, torch.device("cuda" if cuda else "cpu"))


def new_game(run: Run, place: Place, ema: float) -> Game:
    settings = run.experiment.train.model_copy(update={"ema": ema})
    nets = models.build(run.experiment.model, 3, 10, run.experiment.data.size, settings.seed)
    return Game(*nets, settings, place)


def bare(run_path: str, out: str) -> None:
    """Seconds of the steps alone."""
    run = Run.open(Path(run_path))
    place, settings = place_of(run), run.experiment.train
    player, store = Player(new_game(run, place, 0.0), run.experiment.compute.graph), run.store()
    data = Batches(store, store.training, settings.batch_size, settings.seed, place, run.experiment.model)
    began = time.perf_counter()
    with closing(data.from_step(0)) as stream:
        for step, batch in zip(range(settings.steps), stream, strict=False):
            player.play(step, batch)
        [value.item() for value in player.sums.values()]
    Path(out).write_text(json.dumps(time.perf_counter() - began))


def system(run_path: str, out: str) -> None:
    """Seconds from the first batch to the end of `train`."""
    began = []
    play = Player.play

    def first(self: Player, step: int, batch: object) -> None:
        if not began:
            began.append(time.perf_counter())
        play(self, step, batch)  # type: ignore[arg-type]

    Player.play = first  # type: ignore[method-assign,assignment]
    try:
        train.train(Run.open(Path(run_path)))
    finally:
        Player.play = play  # type: ignore[method-assign]
    Path(out).write_text(json.dumps(time.perf_counter() - began[0]))


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
    keep._distance()
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
    return found


def compare(home: Path, size: int, steps: int, pairs: int, device: str, here: bool = False) -> list[dict[str, float]]:
    """Seconds of a pair's bare loop and of its system's."""
    found = []
    for pair in range(pairs):
        seconds = {}
        for work in (bare, system)[:: 1 - 2 * (pair % 2)]:  # who is first takes turns
            run = open_run(home, size, steps, pair, device)
            out = home / f"{work.__name__}.json"
            arguments = (str(run.path), str(out))
            if work is bare or here:
                work(*arguments)
            else:
                cluster.launch(work, arguments, run.experiment.compute, home, f"system-{pair}")
            seconds[work.__name__] = json.loads(out.read_text())
        found.append(seconds)
        added = 100 * (seconds["system"] / seconds["bare"] - 1)
        print(
            f"{steps} steps: bare {seconds['bare']:.2f} s, system {seconds['system']:.2f} s, {added:+.2f} %", flush=True
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="in this process, without Ray")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        make_store(home, chosen.size, 50_000)
        run = open_run(home, chosen.size, chosen.steps, 10**6, chosen.device)
        for name, milliseconds in (stages(run) | parts(run)).items():
            print(f"{name}: {milliseconds:.2f} ms", flush=True)
        pairs = compare(home, chosen.size, chosen.steps, chosen.pairs, chosen.device, chosen.here)
        added = statistics.median(seconds["system"] / seconds["bare"] for seconds in pairs) - 1
        print(f"the system adds {100 * added:.2f} %, median of {chosen.pairs}")


if __name__ == "__main__":
    main()
