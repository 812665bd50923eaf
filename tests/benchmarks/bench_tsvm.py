"""The TSVM against the L2-SVM with the same few labels, on raw pixels: python tests/benchmarks/bench_tsvm.py DIRECTORY

DIRECTORY holds cifar-10-batches-py/, MNIST/raw/ and svhn_sample/, as shared/data/restore.py leaves them. Of --images
random training images a fifth is held out to choose C and the weight of the unlabelled; of the rest 100 a class are
labelled (20 in the 1,083 images of SVHN, which say no more than that it runs) and the others unlabelled. Both
classifiers see the same draws, the same grid of C and features standardised in the same way. On 5,000 images and
two draws the TSVM takes 9 seconds of one core on MNIST and 36 on CIFAR-10.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
from raw_pixel_clustering import load

from dcgan.config import Evaluate
from dcgan.evaluate import svm, tsvm
from dcgan.evaluate.inputs import labelled

SVHN_TEST = 283  # of the 1,083 images


def splits(name: str, directory: Path, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Raw pixels in [0, 1], float32 (N, F), and labels int64 (N,), of train and of test."""
    if name == "svhn":
        with np.load(directory / "svhn_sample" / "svhn_train_first1083.npz") as file:
            x, y = file["x"].reshape(len(file["y"]), -1).astype(np.float32) / 255, file["y"].astype(np.int64)
        return x[:-SVHN_TEST], y[:-SVHN_TEST], x[-SVHN_TEST:], y[-SVHN_TEST:]
    train_x, train_y = load(name, directory, train=True)
    rows = labelled(train_y, images, 0)
    return train_x[rows], train_y[rows], *load(name, directory, train=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--images", type=int, default=0, help="training images, 0: all")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--labels", type=int, default=100, help="a class")
    parser.add_argument("--data", nargs="+", choices=["svhn", "mnist", "cifar10"], default=["svhn", "mnist", "cifar10"])
    chosen = parser.parse_args()
    for name in chosen.data:
        arrays = splits(name, chosen.directory, chosen.images)
        few = min(chosen.labels, 20) if name == "svhn" else chosen.labels
        settings = Evaluate(labels_per_class=few, draws=chosen.draws)
        print(f"{name}: {len(arrays[1])} training images, {few} labels a class, {chosen.draws} draws", flush=True)
        for score in (svm.score_few_labels, tsvm.score):
            wall, cpu = time.perf_counter(), time.process_time()
            found = score(*arrays, settings)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            values = "  ".join(f"{metric} {value:.4g}" for metric, value in found.items())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"  {values}  ({wall:.0f} s, {cpu:.0f} s of processors, peak so far {peak:.0f} MiB)", flush=True)


if __name__ == "__main__":
    main()
