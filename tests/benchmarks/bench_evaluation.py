"""Features, clusters, neighbours, beside the least they could cost: python tests/benchmarks/bench_evaluation.py [-h]

Extraction (images of a store to arrays on disk) beside the bare forward passes of the same net on images in memory,
in turn; our k-means beside scikit-learn's, on the same synthetic clusters with as many starts, seconds and inertia of
each; and the nearest generated image of each real one by bounds beside all pairs. The SVM's are in bench_svm.py.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_system import make_store, new_game, open_run, place_of
from scipy.ndimage import gaussian_filter
from sklearn.cluster import KMeans

from dcgan import export, feature_banks, features
from dcgan.evaluate import generated
from dcgan.evaluate.kmeans import kmeans
from dcgan.evaluate.samples import Samples
from dcgan.numerics import layout


def in_turn(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, a first time left out."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - began)
    return times


def extraction(directory: Path, size: int, device: str, repeats: int) -> None:
    make_store(directory, size, features.PART)
    run = open_run(directory, size, 1, 0, device)
    place, store = place_of(run), run.store()
    weights = directory / export.DISCRIMINATOR
    export.write(weights, new_game(run, place, 0.0).discriminator, run, store)
    extractor = features.load_extractor(weights).to(place.device).to(memory_format=layout(place.device))
    shape = (features.BATCH, 3, size, size)
    images = [torch.rand(shape, device=place.device).contiguous(memory_format=layout(place.device)) for _ in range(4)]

    @features.EXACT
    @torch.no_grad()
    def forward() -> None:
        for number in range(features.PART // features.BATCH):
            last = extractor.discriminator.activations(images[number % 4])
        last[-1].sum().item()

    split = store.training[0]
    times = in_turn(
        {
            "forward": forward,
            "extraction": lambda: feature_banks._extract_part(str(run.path), (str(directory), split, 0)),
        },
        repeats,
    )
    ratios = sorted(a / b for a, b in zip(times["forward"], times["extraction"], strict=True))
    rates = {name: features.PART / statistics.median(seconds) for name, seconds in times.items()}
    print(
        f"{size} px: forward {rates['forward']:,.0f} images/s, extraction {rates['extraction']:,.0f} images/s: "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) of the forward pass's speed",
        flush=True,
    )


def clustering(samples: int, width: int, device: str, repeats: int, starts: int = 10) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((10, width))
    x = (0.2 * centres[rng.integers(10, size=samples)] + rng.standard_normal((samples, width))).astype(np.float32)
    inertia: dict[str, float] = {}

    def ours() -> None:
        inertia["ours"] = kmeans(Samples.centred(x, device), 10, starts, 0).inertia

    def theirs() -> None:
        inertia["theirs"] = float(KMeans(10, n_init=starts, random_state=0).fit(x).inertia_)

    times = in_turn({"theirs": theirs, "ours": ours}, repeats)
    ratios = sorted(a / b for a, b in zip(times["theirs"], times["ours"], strict=True))
    theirs_seconds, ours_seconds = (statistics.median(times[name]) for name in ("theirs", "ours"))
    print(
        f"k-means of {samples:,} x {width:,}, {starts} starts: scikit-learn {theirs_seconds:.1f} s, ours "
        f"{ours_seconds:.1f} s: {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}); inertia "
        f"{inertia['theirs']:.6g} and {inertia['ours']:.6g}",
        flush=True,
    )


def neighbours(known: int, real: int, repeats: int) -> None:
    """Blurred noise of 28 px, whose brightest parts are strokes and blobs. The first known images are not timed."""
    rng = np.random.default_rng(0)

    def strokes(count: int) -> np.ndarray:
        blurred = gaussian_filter(rng.standard_normal((count, 28, 28)).astype(np.float32), (0, 3, 3))
        return (255 * (blurred / blurred.std()).clip(0, 1)).astype(np.uint8)[:, None]

    queries, labels = strokes(real), np.zeros(generated.BLOCK, np.int64)
    nearest = generated._Nearest(queries)
    for _ in range(known // generated.BLOCK):
        nearest.add(strokes(generated.BLOCK), labels)
    known_y, blocks = torch.from_numpy(labels), [strokes(generated.BLOCK) for _ in range(repeats + 1)]
    turn = {"all pairs": iter(blocks), "by bounds": iter(blocks)}

    def every_pair() -> None:
        block = generated._centred(next(turn["all pairs"]), nearest.device)
        lengths = block.square().sum(1) / 2
        for first in range(0, real, generated.QUERIES):
            where = slice(first, first + generated.QUERIES)
            distances, found = (lengths - nearest.queries[where] @ block.T).min(1)
            nearer = distances < nearest.distances[where]
            torch.where(nearer, known_y.to(nearest.device)[found], nearest.labels[where])

    works = {"all pairs": every_pair, "by bounds": lambda: nearest.add(next(turn["by bounds"]), labels)}
    times = in_turn(works, repeats)
    ratios = sorted(a / b for a, b in zip(times["all pairs"], times["by bounds"], strict=True))
    every, bounded = (1000 * statistics.median(seconds) for seconds in times.values())
    print(
        f"the nearest of {generated.BLOCK} more images to {real:,}, after {known:,}: all pairs {every:.0f} ms, "
        f"by bounds {bounded:.0f} ms: {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    for size in chosen.size:
        with tempfile.TemporaryDirectory() as directory:
            extraction(Path(directory), size, chosen.device, chosen.repeats)
    neighbours(100_000, 10_000, 5 * chosen.repeats)
    for samples, width in ((60_000, 784), (20_000, 7_168)):
        clustering(samples, width, chosen.device, chosen.repeats)


if __name__ == "__main__":
    main()
