"""1-nearest-neighbour error of labelled generated images: whether images drawn for a class look like it.

The MNIST table of Radford et al. (2015): a nearest-neighbour classifier is fitted on generated digits, each with the
class it was drawn for, and tested on real ones. Too little variety and wrong classes both raise the error.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dcgan.evaluate.samples import device

log = logging.getLogger(__name__)

QUERIES = 1024  # real images compared at once
BLOCK = 1024  # generated images that they are compared with: 4 MiB of distances, which stay in the cache
MIDDLE = 128  # of a byte: see `_centred`

# Most pairs are too far apart to be compared in all pixels, as DIRECTIONS principal directions of SAMPLE real images
# show (tests/benchmarks/bench_evaluation.py).
DIRECTIONS, SAMPLE = 64, 1024
SLACK = 2**-9  # of a squared length: more than a sum of DIRECTIONS products loses, even of numbers rounded to TF32
SAY_EVERY = 60  # seconds: ten million digits take an hour on two cores
FEW = 1 / 200  # share of pairs above which comparing all of them is faster


def score(
    chunks: Iterable[tuple[np.ndarray, np.ndarray]], real_x: np.ndarray, real_y: np.ndarray, sizes: Sequence[int] = ()
) -> dict[str, float]:
    """`generated_1nn/error`, and `generated_1nn/error_<n>` with the first n generated images, for each n of `sizes`.

    Each is the share of real images (0 to 1, lower is better) whose nearest generated one is of another class.

    chunks: (images uint8 (n, C, H, W), labels int64 (n,)), read once and one at a time: ten million images never exist
    at once. real_x: uint8 (N, C, H, W). real_y: int64 (N,). Euclidean distance between pixels; of equally near images
    the first counts. With 50,000 real training images as chunks this is the table's row for real data.
    Raises ValueError for images of other types or shapes or without labels, or if the chunks lack a class of `real_y`
    or have fewer images than the largest of `sizes`.
    """
    _check("real", real_x, real_y)
    if len(set(sizes)) < len(sizes) or min(sizes, default=1) < 1:
        raise ValueError(f"sizes={list(sizes)}: numbers of generated images are at least 1, and each once")
    nearest, said = _Nearest(real_x), time.monotonic()
    seen, drawn, found = 0, set[int](), {}
    for images, labels in chunks:
        _check("generated", images, labels)
        if images.shape[1:] != real_x.shape[1:]:
            raise ValueError(f"generated images are {images.shape[1:]} and real ones {real_x.shape[1:]}")
        count = len(images)
        ends = {n - seen for n in sizes if seen < n <= seen + count}
        for start, stop in pairwise(sorted({*range(0, count, BLOCK), *ends, count})):
            nearest.add(images[start:stop], labels[start:stop])
            if stop in ends:
                found[f"generated_1nn/error_{seen + stop}"] = nearest.error(real_y)
        seen += count
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            log.info("%s generated images compared", f"{seen:,}")
        drawn.update(np.unique(labels).tolist())
    if seen < max(sizes, default=1):
        raise ValueError(f"{seen} generated images, but the error with {max(sizes, default=1)} is asked for")
    if missing := set(real_y.tolist()) - drawn:
        raise ValueError(f"no generated image is of class {', '.join(map(str, sorted(missing)))}, which real ones have")
    return {"generated_1nn/error": nearest.error(real_y), **found}


class _Nearest:
    """The label of the image nearest so far to each of `queries`, uint8 (N, C, H, W).

    For images q and x with parts a and b in some orthonormal directions, and remainders of lengths r and s, |q - x|^2
    is at least |a - b|^2 + (r - s)^2. Pairs for which that exceeds the distance of the nearest image so far are
    skipped.
    """

    def __init__(self, queries: np.ndarray) -> None:
        self.device = device()
        self.queries = _centred(queries, self.device)
        # Half the squared distance, less half the query's own squared length, which does not change the order.
        self.distances = torch.full((len(queries),), torch.inf, device=self.device)
        self.labels = torch.full((len(queries),), -1, device=self.device)
        self.mean = self.queries.mean(0, dtype=torch.float64)
        some = self.queries[:SAMPLE] - self.mean
        self.directions = torch.linalg.svd(some, full_matrices=False).Vh[:DIRECTIONS].T
        self.sketches, lengths = self._sketch(self.queries)
        self.longest = lengths.max()
        self.moved = (self.queries.double().square().sum(1) / 2 - lengths).float()  # since lengths are from the mean

    def add(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Compare with the next images, uint8 (n, C, H, W), and their labels, int64 (n,)."""
        known, known_y = _centred(images, self.device), torch.from_numpy(labels).to(self.device)
        sketches, from_mean = self._sketch(known)
        slack = 2 * SLACK * torch.maximum(self.longest, from_mean.max())
        lengths, limits = known.square().sum(1) / 2, (self.distances + self.moved + slack).float()
        bounds = from_mean.float()
        for first in range(0, len(self.queries), QUERIES):
            where = slice(first, first + QUERIES)
            apart = torch.addmm(bounds, self.sketches[where], sketches.T, alpha=-1)
            pairs = (apart < limits[where, None]).nonzero()
            distances, nearest = _nearest(self.queries[where], known, lengths, pairs)
            nearer = distances < self.distances[where]
            self.distances[where] = torch.where(nearer, distances, self.distances[where])
            self.labels[where] = torch.where(nearer, known_y[nearest], self.labels[where])

    def error(self, truth: np.ndarray) -> float:
        return float((self.labels.cpu().numpy() != truth).mean())

    def _sketch(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D + 1): the images' parts in the directions and the length of the rest; half their squared lengths."""
        parts = images - self.mean
        inside, lengths = parts @ self.directions, parts.square().sum(1)
        rest = (lengths - inside.square().sum(1)).clamp_min(0).sqrt()
        return torch.cat([inside, rest[:, None]], 1).float(), lengths / 2


def _nearest(queries: Tensor, known: Tensor, lengths: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """For each query, the smallest distance among `pairs` (P, 2) of positions in both, and the first `known` with it.

    Queries without a pair get infinity. lengths: half the squared lengths of `known`.
    """
    if len(pairs) > FEW * len(queries) * len(known):
        return (lengths - queries @ known.T).min(1)
    rows, columns = pairs.T
    apart = lengths[columns] - (queries[rows] * known[columns]).sum(1)
    distances = torch.full_like(queries[:, 0], torch.inf).scatter_reduce_(0, rows, apart, "amin")
    found = apart == distances[rows]
    first = rows.new_full((len(queries),), len(known) - 1).scatter_reduce_(0, rows[found], columns[found], "amin")
    return distances, first


def _centred(images: np.ndarray, device: str) -> Tensor:
    """float32 (n, C * H * W): whole numbers from -128 to 127.

    The sum of up to 1,024 products of two such is at most 2**24, so float32 holds it exactly, in any order of
    summation: equal images are equally near wherever they appear.
    """
    return torch.from_numpy(np.subtract(images.reshape(len(images), -1), MIDDLE, dtype=np.float32)).to(device)


def _check(which: str, images: np.ndarray, labels: np.ndarray) -> None:
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1] or not images.size:
        shapes = f"{images.dtype} {images.shape} with labels {labels.shape}"
        raise ValueError(f"{which} images are {shapes}, not uint8 (N, C, H, W) with (N,) and N at least 1")
    if labels.min() < 0:
        raise ValueError(f"{which} images have {(labels < 0).sum()} without a label: a neighbour tells its class")
