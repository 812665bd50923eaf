"""Draws images from a generator: those of fixed z, and as many others as an evaluation needs."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dcgan.config import Model
from dcgan.data import batches
from dcgan.models import Generator
from dcgan.numerics import layout
from dcgan.pictures import to_uint8

DRAW_BATCH = 256  # images per forward pass
CHUNK = 1000  # images yielded at a time; each chunk has its own z
FIRST = 2**62  # stream number of the first chunk's z, which training never reaches
FIXED = 2**63  # stream number of the z of grids and of a checkpoint's distance


@torch.no_grad()
def draw(net: Generator, z: Tensor, labels: Tensor | None) -> Tensor:
    """Images (n, C, H, W) float32 in [-1, 1] on the CPU. Uses BatchNorm's running statistics, keeps the net's mode."""
    was_training, device = net.training, next(net.parameters()).device
    net.eval()
    parts = []
    for start in range(0, len(z), DRAW_BATCH):
        part = slice(start, start + DRAW_BATCH)
        parts.append(net(z[part].to(device), labels[part].to(device) if labels is not None else None).float().cpu())
    net.train(was_training)
    return torch.cat(parts)


def fixed_noise(model: Model, classes: int, count: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """z (n, z_dim) and labels (n,) of a grid: `count` images, or, if conditional, that many per class, in order."""
    rows = count if not model.conditional else classes * count
    z = torch.from_numpy(batches.noise(model.z, (rows, model.z_dim), seed, FIXED))
    return z, torch.arange(classes).repeat_interleave(count) if model.conditional else None


def sampled(
    generator: Generator, model: Model, classes: int, count: int, seed: int, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`count` images uint8 (n, C, H, W) and the class each was drawn for, int64 (n,), CHUNK at a time.

    The classes take turns, so the first images are balanced, too; without labels the class is -1. The images do not
    depend on `count`: they are a pure function of the weights and `seed`. BatchNorm uses its running statistics. The
    generator is moved to `device`, in the memory format that is fastest there.
    Raises ValueError if `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count={count}: at least 1 image is drawn")
    return _chunks(generator.to(device).to(memory_format=layout(device)), model, classes, count, seed)


def _chunks(
    generator: Generator, model: Model, classes: int, count: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for number, first in enumerate(range(0, count, CHUNK)):
        z = torch.from_numpy(batches.noise(model.z, (CHUNK, model.z_dim), seed, FIRST + number))
        labels = torch.arange(first, first + CHUNK) % classes if model.conditional else None
        here = min(CHUNK, count - first)  # the rest is drawn, too: a smaller batch would round differently
        images = to_uint8(draw(generator, z, labels).numpy())[:here]
        yield images, np.full(here, -1) if labels is None else labels.numpy()[:here]
