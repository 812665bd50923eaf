"""k-means on raw pixels against the published figures: python tests/benchmarks/raw_pixel_clustering.py DIRECTORY

DIRECTORY holds cifar-10-batches-py/ and MNIST/raw/, as torchvision unpacks them. The bar: NMI within 0.01, accuracy
within 0.02 of the published ones. About a minute a data set and seed on 2 cores.
"""

import argparse
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, MNIST

from dcgan.config import Evaluate
from dcgan.evaluate import clustering
from dcgan.evaluate.published import RAW_PIXELS

METRICS = ("clustering/nmi", "clustering/nmi_geometric", "clustering/ari", "clustering/accuracy")


def load(name: str, directory: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Raw pixels in [0, 1], float32 (N, F), and labels int64 (N,)."""
    data = {"cifar10": CIFAR10, "mnist": MNIST}[name](directory, train=train)
    images = np.asarray(data.data)
    return images.reshape(len(images), -1).astype(np.float32) / 255, np.asarray(data.targets, np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--restarts", type=int, default=10, help="k-means restarts a seed")
    parser.add_argument("--data", nargs="+", choices=["cifar10", "mnist"], default=["cifar10", "mnist"])
    chosen = parser.parse_args()
    print("data     seed  " + "  ".join(name.removeprefix("clustering/") for name in METRICS))
    for name in chosen.data:
        train, test = (load(name, chosen.directory, split) for split in (True, False))
        for seed in range(chosen.seeds):
            found = clustering.score(*train, *test, Evaluate(restarts=chosen.restarts, seed=seed))
            print(f"{name:8} {seed:4}  " + "  ".join(f"{found[m]:.4f}" for m in METRICS), flush=True)
        published = RAW_PIXELS[name]
        print(f"{name:8}   published  " + "  ".join(f"{m} {published[m].value}" for m in METRICS if m in published))


if __name__ == "__main__":
    main()
