"""Training from a store that does not fit in memory: python tests/benchmarks/bench_large_store.py [--gigabytes N]

Writes a store of so many gigabytes of random 64 px images beside one of 0.5 GB, which stays in the page cache, and
plays blocks of steps from each in turn, both in this process: the ratio of their speeds, how long a batch was waited
for, what was read from the disk, and the process's own memory (not the page cache, which the kernel takes back). Before
each block the cache of the large store is dropped if the kernel lets us, so that every image is read from the disk.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_step import ours

from dcgan.config import Model
from dcgan.data.batches import Batches, permutation
from dcgan.distributed import Place

SIZE, BATCH = 64, 128
SHARD = 2**26 // (3 * SIZE * SIZE)  # images, as ingestion makes them


class Files:
    """Of a store what `Batches` reads; a manifest of 20 GB would take longer than the measurement."""

    def __init__(self, directory: Path, gigabytes: float) -> None:
        rng = np.random.default_rng(0)
        self.paths = [directory / f"{number}.npy" for number in range(max(1, int(gigabytes * 1e9 / 2**26)))]
        for path in self.paths:
            np.save(path, rng.integers(0, 256, (SHARD, 3, SIZE, SIZE), np.uint8))

    def count(self, *splits: str) -> int:
        return SHARD * len(self.paths)

    def shards(self, *splits: str) -> list[np.ndarray]:
        return [np.load(path, mmap_mode="r") for path in self.paths]

    def labels(self, *splits: str) -> np.ndarray:
        return np.zeros(self.count(), np.int64)

    def forget(self) -> None:
        for path in self.paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key))) / 1e9


def read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--steps", type=int, default=40, help="a block (default %(default)s)")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where the store is written")
    chosen = parser.parse_args()
    began = time.perf_counter()
    for epoch in range(3):
        permutation(3_000_000, 0, epoch)
    print(f"the order of 3,000,000 images: {(time.perf_counter() - began) / 3:.3f} s an epoch, in the reading thread")
    with tempfile.TemporaryDirectory(dir=chosen.directory) as directory:
        stores = {}
        for name, gigabytes in (("resident", 0.5), ("large", chosen.gigabytes)):
            path = Path(directory, name)
            path.mkdir()
            stores[name] = Files(path, gigabytes)
        place = Place(0, 1, torch.device("cpu"))
        play, model = ours(SIZE, BATCH, place.device), Model(z="normal")
        speeds: dict[str, list[float]] = {name: [] for name in stores}
        waits: dict[str, list[float]] = {name: [] for name in stores}
        read: dict[str, int] = dict.fromkeys(stores, 0)
        own = 0.0
        for block in range(chosen.blocks + 1):  # the first warms up
            for name, store in stores.items():
                if name == "large":
                    store.forget()
                data = Batches(store, ("train",), BATCH, block, place, model)  # type: ignore[arg-type]
                before = read_bytes()
                with closing(data.from_step(0)) as stream:
                    batch = next(stream)
                    began, waited = time.perf_counter(), 0.0
                    for step in range(chosen.steps):
                        play.play(step, batch)
                        asked = time.perf_counter()
                        batch = next(stream)
                        waited += time.perf_counter() - asked
                        own = max(own, status("RssAnon"))
                    seconds = time.perf_counter() - began
                if block:
                    speeds[name].append(chosen.steps * BATCH / seconds)
                    waits[name].append(waited / seconds)
                    read[name] += read_bytes() - before
        for name in stores:
            print(
                f"{name} ({stores[name].count() * 3 * SIZE**2 / 1e9:.1f} GB): {statistics.median(speeds[name]):.0f} "
                f"images/s, {statistics.median(waits[name]):.2%} of the time waiting, "
                f"{read[name] / 1e6:.0f} MB read from disk"
            )
        ratios = sorted(a / b for a, b in zip(speeds["large"], speeds["resident"], strict=True))
        print(f"large / resident: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
        print(f"own memory at its highest {own:.2f} GB; of the maps {status('RssFile'):.2f} GB at the end")


if __name__ == "__main__":
    main()
