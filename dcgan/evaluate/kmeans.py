"""k-means with several k-means++ starts, run together so that they share every pass over the features.

Arthur and Vassilvitskii (2007) with the greedy trials of scikit-learn's `KMeans`, then Lloyd's iterations as it does
them. Features may be float16 and are read a block at a time, on a CPU or CUDA.
"""

import logging
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcgan.evaluate.samples import Samples

log = logging.getLogger(__name__)

SAY_EVERY = 60  # seconds: Tiny ImageNet takes hours
ITERATIONS = 300  # scikit-learn's
ROWS = 1024  # compared at once on a CPU: fewer would read the centres too often
TOLERANCE = 1e-4  # of a feature's mean variance: the centres' total squared shift that is small enough; scikit-learn's


class Clusters(NamedTuple):
    """labels int64 (N,): each sample's cluster. inertia: the sum of squared distances to each sample's centre."""

    labels: np.ndarray
    inertia: float


def kmeans(x: Samples, count: int, starts: int, seed: int) -> Clusters:
    """The clustering of lowest inertia among `starts` of x into `count` clusters.

    Raises ValueError if there are fewer samples than clusters.
    """
    if count > len(x):
        raise ValueError(f"{len(x)} samples can't make {count} clusters")
    squared = torch.cat([block.square().sum(1) for _, block in x.blocks()])
    rng = np.random.default_rng(seed)
    return lloyd(x, plus_plus(x, squared, count, starts, rng), squared)


def plus_plus(x: Samples, squared: Tensor, count: int, starts: int, rng: np.random.Generator) -> Tensor:
    """Centres (starts, count, F): each new one is the best of 2 + log(count) samples drawn by squared distance."""
    trials = 2 + int(np.log(count))
    centres = torch.empty(starts, count, x.width, device=x.device)
    chosen = rng.integers(len(x), size=(starts, 1))
    nearest = torch.full((starts, len(x)), torch.inf, device=x.device)
    said = time.monotonic()
    for number in range(count):
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            log.info("k-means: %d of %d centres chosen to start from", number, count)
        if number:
            cumulated = nearest.double().cumsum(1)
            where = torch.from_numpy(rng.random((starts, trials))).to(x.device) * cumulated[:, -1:]
            chosen = torch.searchsorted(cumulated, where).clamp_(max=len(x) - 1).cpu().numpy()
        rows, order = np.unique(chosen, return_inverse=True)
        candidates = torch.cat([block.clone() for _, block in x.take(rows).blocks()])
        candidates = candidates[torch.from_numpy(order.reshape(-1)).to(x.device)]
        distances = squared_distances(x, candidates, squared).view(*chosen.shape, -1)
        distances = torch.minimum(distances, nearest[:, None])
        best = distances.sum(2, dtype=torch.float64).argmin(1)
        every = torch.arange(starts, device=x.device)
        nearest = distances[every, best]
        centres[:, number] = candidates.view(*chosen.shape, -1)[every, best]
    return centres


def squared_distances(x: Samples, centres: Tensor, squared: Tensor) -> Tensor:
    """(K, N) of samples (N, F), whose squared lengths are `squared` (N,), to centres (K, F)."""
    found = torch.empty(len(centres), len(x), device=x.device)
    lengths = centres.square().sum(1, keepdim=True)
    for where, block in _blocks(x):
        torch.addmm(lengths, centres, block.T, alpha=-2, out=found[:, where])
    return found.add_(squared).clamp_(min=0)


def lloyd(x: Samples, centres: Tensor, squared: Tensor) -> Clusters:
    """Lloyd's iterations from centres (starts, K, F), until nothing changes or centres hardly move; the best result."""
    starts, count, _ = centres.shape
    limit = TOLERANCE * _mean_variance(x, squared)
    labels = torch.full((starts, len(x)), -1, device=x.device)
    going = torch.arange(starts, device=x.device)
    said = time.monotonic()
    for iteration in range(ITERATIONS):
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            log.info("k-means: %d iterations, %d of %d starts still move", iteration, len(going), starts)
        nearest, distances, sums = _assign(x, centres[going], squared)
        same = (nearest == labels[going]).all(1)
        labels[going] = nearest
        sizes = torch.stack([each.bincount(minlength=count) for each in nearest])
        _refill(x, nearest, distances, sums, sizes)
        # A cluster that lost its only samples to `_refill` is empty now, and its centre stays where it is.
        moved = torch.where(sizes[:, :, None] > 0, sums / sizes[:, :, None], centres[going])
        shift = (moved - centres[going]).square().sum((1, 2))
        centres[going] = torch.where(same[:, None, None], centres[going], moved)
        going = going[~same & (shift > limit)]
        if not len(going):
            break
    labels, distances, _ = _assign(x, centres, squared)
    inertia = distances.sum(1, dtype=torch.float64)
    best = int(inertia.argmin())
    return Clusters(labels[best].cpu().numpy(), float(inertia[best]))


def _assign(x: Samples, centres: Tensor, squared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each start: each sample's nearest centre (S, N) and squared distance to it, and clusters' sums (S, K, F)."""
    starts, count, width = centres.shape
    flat = centres.view(-1, width)
    half = flat.square().sum(1, keepdim=True) / 2
    nearest = torch.empty(starts, len(x), dtype=torch.int64, device=x.device)
    distances, sums = torch.empty(starts, len(x), device=x.device), torch.zeros_like(flat)
    for where, block in _blocks(x):
        scores = torch.addmm(half, flat, block.T, alpha=-1).view(starts, count, -1)
        found, own = scores.min(1)
        nearest[:, where], distances[:, where] = own, found
        sums.addmm_(torch.zeros_like(scores).scatter_(1, own[:, None], 1).view(len(flat), -1), block)
    return nearest, distances.mul_(2).add_(squared).clamp_(min=0), sums.view(starts, count, width)


def _refill(x: Samples, nearest: Tensor, distances: Tensor, sums: Tensor, sizes: Tensor) -> None:
    """Give each empty cluster the sample furthest from its centre, taken from its old cluster; as scikit-learn does."""
    for start in (sizes == 0).any(1).nonzero().flatten().tolist():
        empty = (sizes[start] == 0).nonzero().flatten()
        for cluster, row in zip(empty, distances[start].topk(len(empty)).indices, strict=True):
            (_, sample), *_ = x.take(row.cpu().numpy()[None]).blocks()
            old = nearest[start, row]
            sums[start, old] -= sample[0]
            sums[start, cluster] = sample[0]
            sizes[start, old] -= 1
            sizes[start, cluster] = 1


def _mean_variance(x: Samples, squared: Tensor) -> Tensor:
    """The variance over the samples, averaged over features."""
    total = torch.zeros(x.width, dtype=torch.float64, device=x.device)
    for _, block in x.blocks():
        total += block.sum(0, dtype=torch.float64)
    return (squared.sum(dtype=torch.float64) / len(x) - (total / len(x)).square().sum()) / x.width


def _blocks(x: Samples) -> Iterator[tuple[slice, Tensor]]:
    return x.blocks(ROWS if x.device.type == "cpu" else 0)
