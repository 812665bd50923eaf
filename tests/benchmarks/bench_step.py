"""Our training step beside the eager loop of PyTorch's tutorial: python tests/benchmarks/bench_step.py [--help]

Same architecture, batch, images; both play blocks of steps in turn, and what is reported is the ratio of each pair:
median and range. Then images a second, operations a second as a share of what a matrix product reaches here, and on
request each of our choices undone alone. Needs torch, numpy and pydantic.
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tutorial import Tutorial, loaded

from dcgan import memory, models
from dcgan.config import Model, Train
from dcgan.data.batches import Batch
from dcgan.distributed import Place
from dcgan.numerics import numerics
from dcgan.player import Player
from dcgan.step import Game

VARIANTS = {
    "ours": {},
    "without a graph": {"graph": False},
    "float32": {"precision": "float32"},
    "contiguous": {"memory_format": "contiguous"},
    "channels last": {"memory_format": "channels_last"},
    "float32, contiguous, without a graph": {"precision": "float32", "memory_format": "contiguous", "graph": False},
}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large matrix product, the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def batches(size: int, count: int, device: torch.device, number: int = 8) -> list[Batch]:
    return [
        Batch(
            torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device),
            torch.zeros(count, dtype=torch.int64, device=device),
            torch.randn(count, 100, device=device),
        )
        for _ in range(number)
    ]


def ours(size: int, count: int, device: torch.device, graph: bool = True, width: int = 64, **settings: str) -> Player:
    nets = models.build(Model(kernel=4, width=width, z="normal"), 3, 0, size, seed=0)
    game = Game(*nets, Train(steps=10**9, batch_size=count, **settings), Place(0, 1, device))
    return Player(game, graph)


def operations(size: int, count: int, width: int = 64) -> int:
    """Of one step as its sums are written, by PyTorch's count, on the CPU; contiguous: no layer in another way."""
    cpu, plain = torch.device("cpu"), {"precision": "float32", "memory_format": "contiguous"}
    play, (batch,) = ours(size, 2, cpu, width=width, **plain), batches(size, 2, cpu, 1)
    with FlopCounterMode(display=False) as counter:
        play.play(0, batch)
    return counter.get_total_flops() * count // 2


def compare(size: int, count: int, device: torch.device, pairs: int, block: float, variants: list[str]) -> dict:
    torch.backends.cudnn.benchmark = True  # for all alike: what cuDNN chose for a shape it keeps, whoever asked first
    memory.keep()  # as training does; the eager loop, in the same process, gains by it, too
    data = batches(size, count, device)
    floats = [batch.images.float().div(127.5).sub(1) for batch in data]
    eager = Tutorial(size, device)
    plays = {name: ours(size, count, device, **VARIANTS[name]) for name in variants}

    def run_eager(steps: int) -> None:
        for i in range(steps):
            eager(floats[i % len(floats)])

    def run(play: Player, steps: int) -> None:
        for i in range(steps):
            play.play(i, data[i % len(data)])
        {name: value.item() for name, value in play.sums.items()}

    runs = {"eager": run_eager, **{name: (lambda n, p=play: run(p, n)) for name, play in plays.items()}}
    steps = {}
    for name, each in runs.items():
        each(6)
        steps[name] = max(2, int(block / (seconds(lambda e=each: e(2), device) / 2)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(pairs):
        for name, each in runs.items():
            times[name].append(seconds(lambda e=each, n=name: e(steps[n]), device) / steps[name])
    work = operations(size, count)
    found = {}
    for name in variants:
        ratios = sorted(e / t for e, t in zip(times["eager"], times[name], strict=True))
        middle = statistics.median(times[name])
        found[name] = {
            "ratio": statistics.median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
            "ms": 1e3 * middle,
            "images_per_second": count / middle,
            "operations_per_second": work / middle,
        }
    middle = statistics.median(times["eager"])
    found["eager"] = {"ms": 1e3 * middle, "images_per_second": count / middle, "operations_per_second": work / middle}
    return found


def compare_inputs(size: int, count: int, device: torch.device, pairs: int, block: float, images: int = 20_000) -> dict:
    """Both with their own input: ImageFolder and a DataLoader of two processes on PNG files, our batches on a store.

    The DataLoader's processes are stopped while it is our turn, so that they load for the eager loop in its own time.
    """
    from dcgan.data.batches import Batches
    from dcgan.data.store import Description

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from fabricated import write_store
    from PIL import Image

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        tree, pixels = Path(directory, "tree", "class"), []
        tree.mkdir(parents=True)
        for number in range(images):  # smooth, as photographs are
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            picture = coarse.resize((size, size), Image.Resampling.BICUBIC)
            picture.save(tree / f"{number:05d}.png")
            pixels.append((np.asarray(picture).transpose(2, 0, 1), 0))
        description = Description("smooth", ("class",), size, 3, "none")
        store = write_store(Path(directory, "home"), description, {"train": pixels, "test": pixels[:2]})
        eager, theirs = Tutorial(size, device), loaded(str(tree.parent), size, count)
        play = ours(size, count, device)
        stream = Batches(store, ("train",), count, 0, play.game.place, Model(z="normal")).from_step(0)
        steps = {"eager": 0, "ours": 0}

        def one(name: str) -> None:
            if name == "eager":
                eager(next(theirs))
            else:
                play.play(steps[name], next(stream))
                steps[name] += 1

        times: dict[str, list[float]] = {name: [] for name in steps}
        try:
            for pair in range(pairs + 1):
                for name in steps:
                    _signal_loaders(signal.SIGCONT if name == "eager" else signal.SIGSTOP)
                    number, began = 0, time.perf_counter()
                    while time.perf_counter() - began < block or number < 2:
                        one(name)
                        number += 1
                    wait(device)
                    if pair:
                        times[name].append((time.perf_counter() - began) / number)
        finally:  # or the interpreter would wait at its end for processes that are stopped
            stream.close()
            _signal_loaders(signal.SIGCONT)
    ratios = sorted(e / t for e, t in zip(times["eager"], times["ours"], strict=True))
    eager_ms, ours_ms = (1e3 * statistics.median(times[name]) for name in times)
    middle = statistics.median(ratios)
    return {"ratio": middle, "lowest": ratios[0], "highest": ratios[-1], "eager_ms": eager_ms, "ms": ours_ms}


def _signal_loaders(number: int) -> None:
    for process in multiprocessing.active_children():
        os.kill(int(process.pid or 0), number)


def profile(size: int, count: int, device: torch.device, steps: int = 20) -> None:
    """Where the time of our steps goes, by kernel or operator."""
    play, data = ours(size, count, device), batches(size, count, device)
    for i in range(8):
        play.play(i, data[i])
    wait(device)
    with torch.profiler.profile() as measured:
        for i in range(steps):
            play.play(i, data[i % len(data)])
        wait(device)
    on_cuda = device.type == "cuda"
    rows = [
        ((e.self_device_time_total if on_cuda else e.self_cpu_time_total) / steps, e.count / steps, e.key)
        for e in measured.key_averages()
    ]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    print(f"{size} px, batch {count}: {sum(r[0] for r in rows):.0f} us a step in {sum(r[1] for r in rows):.0f} calls")
    for time_, calls, name in rows[:40]:
        print(f"  {time_:8.1f} us {calls:6.1f} x  {name[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs="+", default=[32])
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--pairs", type=int, default=9, help="pairs of blocks (default %(default)s)")
    parser.add_argument("--block", type=float, default=1.0, help="seconds a block (default %(default)s)")
    parser.add_argument("--variants", nargs="+", default=["ours"], choices=[*VARIANTS, "all"])
    parser.add_argument("--input", action="store_true", help="also compare both with their own input")
    parser.add_argument("--profile", action="store_true", help="list what our step is made of, and time nothing")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if chosen.profile:
        for size in chosen.size:
            for count in chosen.batch:
                profile(size, count, device)
        return
    variants = list(VARIANTS) if "all" in chosen.variants else chosen.variants
    fastest = numerics(Train(steps=1), device).dtype  # where a processor doesn't multiply in bfloat16, it takes minutes
    rates = {str(dtype).removeprefix("torch."): peak(dtype, device) for dtype in {fastest, torch.float32}}
    print(", ".join(f"{name} product {rate / 1e12:.2f} Top/s" for name, rate in rates.items()), flush=True)
    results = []
    for size in chosen.size:
        for count in chosen.batch:
            found = compare(size, count, device, chosen.pairs, chosen.block, variants)
            results.append({"size": size, "batch": count, **found})
            for name, row in found.items():
                ratio = f"{row['ratio']:5.2f}x ({row['lowest']:.2f} to {row['highest']:.2f})" if "ratio" in row else ""
                share = row["operations_per_second"] / max(rates.values())
                print(
                    f"{size} px, batch {count}, {name}: {row['ms']:.3f} ms, {row['images_per_second']:,.0f} images/s, "
                    f"{share:.1%} of the fastest product {ratio}",
                    flush=True,
                )
            if chosen.input:
                row = compare_inputs(size, count, device, chosen.pairs, 4 * chosen.block)
                print(
                    f"{size} px, batch {count}, each with its own input: eager {row['eager_ms']:.1f} ms, ours "
                    f"{row['ms']:.1f} ms: {row['ratio']:.2f}x ({row['lowest']:.2f} to {row['highest']:.2f})",
                    flush=True,
                )
    if chosen.json:
        chosen.json.write_text(json.dumps({"peaks": rates, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
