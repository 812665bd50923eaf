"""Ingestion beside the usual way: 256 px JPEG to 64 px, against ImageFolder, Resize, CenterCrop and a DataLoader.

    python tests/benchmarks/bench_ingest.py DIRECTORY [--images 24576] [--repeats 3]
    python tests/benchmarks/bench_ingest.py DIRECTORY --memory
    python tests/benchmarks/bench_ingest.py DIRECTORY --exactness

DIRECTORY holds images (any tree). They are made into JPEG like LSUN's first, 341x256 and 15 KB on average, as many as
there are and then the same again under other names. Images a second are of so many processes, turn about: for a
DataLoader over an epoch, for Ray Data from when every process has made a shard; and of the whole ingestion by threads,
as small sets are, listing, hashing and publishing included.
--memory measures instead the largest resident set of a process that ingests 10,000 and 100,000 images, --exactness how
far the pixels of images that are scaled while they are decoded are from those of Pillow's filters on the whole image.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dcgan import cluster, environment
from dcgan.config import Data
from dcgan.data import ingest, shards
from dcgan.data.decode import decode

PROCESSES = environment.cpus()
BATCH = 128
QUALITY = 90  # of the JPEG: the 96 px rooms, enlarged, then have the 15 KB that LSUN has for a bedroom


def make_tree(source: Path, root: Path, count: int) -> Path:
    """`count` JPEG of 341x256 in one class directory; the same picture again is a hard link."""
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    (root / "all").mkdir(parents=True)
    made: list[Path] = []
    for i in range(count):
        path = root / "all" / f"{i:06d}.jpg"
        if i < min(len(files), 4096):
            with Image.open(files[i]) as image:
                ImageOps.fit(image.convert("RGB"), (341, 256), Image.Resampling.BICUBIC).save(path, quality=QUALITY)
            made.append(path)
        else:
            os.link(made[i % len(made)], path)
    return root


def theirs(tree: Path) -> float:
    """Images a second of the usual input pipeline."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize(64), v2.CenterCrop(64), v2.PILToTensor()])
    start = time.perf_counter()
    loader = DataLoader(ImageFolder(str(tree), transform), BATCH, num_workers=PROCESSES)
    count = sum(len(labels) for _, labels in loader)
    return count / (time.perf_counter() - start)


def ours(tree: Path, maker: ingest.Maker) -> float:
    """Images a second of the whole ingestion: listing, hashing, decoding, writing, publishing."""
    with tempfile.TemporaryDirectory(dir=tree.parent) as home:
        data = Data(name="folder", size=64, source=str(tree), test_fraction=0.01)
        start = time.perf_counter()
        ingest.ingest(data, Path(home), maker=maker)
        return len(list((tree / "all").iterdir())) / (time.perf_counter() - start)


def by_ray(home: Path, workers: int) -> Callable[..., Iterator[dict]]:
    """Ray Data with this many processes."""
    return lambda function, jobs: cluster.scatter(function, jobs, home, workers)


def rate(tree: Path, home: Path, workers: int) -> float:
    """Images a second of so many Ray workers, from when each has made a shard to the last one."""
    times: list[tuple[float, int]] = []

    def watched(function: Callable, jobs: list) -> Iterator[dict]:
        for record in by_ray(home, workers)(function, jobs):
            times.append((time.perf_counter(), len(record["labels"])))
            yield record

    ours(tree, watched)
    if len(times) < 4 * workers:
        raise ValueError(f"{len(times)} shards for {workers} processes: --images has to be larger to see a rate")
    first = times[workers - 1][0]  # by then every worker runs
    return sum(count for _, count in times[workers:]) / (times[-1][0] - first)


def report(name: str, ratios: list[float]) -> None:
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |", flush=True)


def compare(tree: Path, repeats: int) -> None:
    ingest.MANY = 1
    shards.BYTES = 2**24  # 1,024 images of 64 px a shard, a quarter of the usual: enough shards to see a rate
    size = sum(file.stat().st_size for file in (tree / "all").iterdir()) / len(list((tree / "all").iterdir()))
    found = [
        (theirs(tree), rate(tree, tree.parent, PROCESSES), rate(tree, tree.parent, 1), ours(tree, ingest.by_threads))
        for _ in range(repeats)
    ]
    print(f"{size / 1024:.1f} KB an image; images a second, {PROCESSES} processes unless it says otherwise\n")
    print("| DataLoader | Ray Data | Ray Data, one process | threads, whole ingestion |\n|---|---|---|---|")
    for row in found:
        print("|", " | ".join(f"{value:,.0f}" for value in row), "|")
    print("\n| ratio | median | range |\n|---|---|---|")
    report("Ray Data / DataLoader", [ray / loader for loader, ray, _, _ in found])
    report(f"{PROCESSES} Ray processes / one", [ray / one for _, ray, one, _ in found])
    report("threads / DataLoader", [threads / loader for loader, _, _, threads in found])


def memory(source: Path) -> None:
    for count in (10_000, 100_000):
        with tempfile.TemporaryDirectory() as root:
            tree = make_tree(source, Path(root) / "tree", count)
            script = (
                "import sys, resource; from pathlib import Path; from dcgan.config import Data;"
                "from dcgan.data.ingest import ingest;"
                "ingest(Data(name='folder', size=64, source=sys.argv[1], test_fraction=0.01), Path(sys.argv[2]));"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
            )
            command = [sys.executable, "-c", script, str(tree), str(Path(root) / "home")]
            used = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(f"{count:,} images: {int(used)} MiB at most", flush=True)


def exactness(source: Path) -> None:
    """Mean difference in levels between ways to bring a 256 px JPEG to 64 px."""
    filters = {"bilinear": 2, "box": 4, "bicubic": 3, "Lanczos": 1}
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("scaled in decoding", *filters)}
    with tempfile.TemporaryDirectory() as root:
        for path in sorted((make_tree(source, Path(root) / "tree", 512) / "all").iterdir()):
            found["scaled in decoding"].append(decode(path.read_bytes(), 64))
            with Image.open(path) as image:
                for name, number in filters.items():
                    small = image.resize((64, 64), Image.Resampling(number))
                    found[name].append(np.asarray(small).transpose(2, 0, 1))
    arrays = {name: np.stack(images).astype(int) for name, images in found.items()}
    print("| |", " | ".join(arrays), "|\n|---|", "---|" * len(arrays), sep="")
    for name, array in arrays.items():
        print(f"| {name} |", " | ".join(f"{np.abs(array - other).mean():.2f}" for other in arrays.values()), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--images", type=int, default=24_576)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--exactness", action="store_true")
    chosen = parser.parse_args()
    if chosen.exactness:
        exactness(chosen.directory)
        return
    if chosen.memory:
        memory(chosen.directory)
        return
    with tempfile.TemporaryDirectory() as root:
        compare(make_tree(chosen.directory, Path(root) / "tree", chosen.images), chosen.repeats)


if __name__ == "__main__":
    main()
