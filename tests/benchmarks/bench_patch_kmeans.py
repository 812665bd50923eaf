"""The 1-layer k-means baseline on CIFAR-10: python tests/benchmarks/bench_patch_kmeans.py DIRECTORY

DIRECTORY holds cifar-10-batches-py/, as torchvision unpacks it. The bar: 70 % with 400 centroids and 77.0 % with 1,600,
for which 77.9 % is published; with 400 labels a class, 63.7 % is published for 4,800. Features of N centroids take
N x 0.9 MiB.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from torchvision.datasets import CIFAR10

from dcgan.config import Evaluate
from dcgan.evaluate import patch_kmeans
from dcgan.evaluate.svm import L2SVM, score_few_labels

T = TypeVar("T")


def load(directory: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,)."""
    data = CIFAR10(directory, train=train)
    return np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)), np.asarray(data.targets, np.int64)


def timed(part: str, work: Callable[[], T]) -> T:
    """What `work` returns, once its seconds on the clock and of processors are printed."""
    wall, cpu = time.perf_counter(), time.process_time()
    done = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"  {part:10} {wall:6.1f} s, {cpu:6.1f} s of processors", flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--centroids", type=int, nargs="+", default=[400, 1600])
    parser.add_argument("--draws", type=int, default=10, help="of 400 labels a class; 0: all labels only")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    (train_images, train_y), (test_images, test_y) = (load(chosen.directory, split) for split in (True, False))
    for centroids in chosen.centroids:
        print(f"{centroids} centroids, seed {chosen.seed}", flush=True)
        model = patch_kmeans.PatchKMeans(centroids, chosen.seed)
        timed("fit", partial(model.fit, train_images))
        train_x = timed("transform", partial(model.transform, train_images))
        test_x = model.transform(test_images)
        patch_kmeans.standardise(train_x, test_x)
        svm = L2SVM(C=patch_kmeans.PENALTY / len(train_x))
        timed("SVM", partial(svm.fit, train_x, train_y))
        print(f"  all labels: {(svm.predict(test_x) == test_y).mean():.4f}", flush=True)
        if chosen.draws:
            settings = Evaluate(labels_per_class=400, draws=chosen.draws, seed=chosen.seed)
            work = partial(score_few_labels, train_x, train_y, test_x, test_y, settings)
            found = timed("few labels", work)
            print("  " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
