"""Features as the protocols read them, standardised a block at a time, and the device that they compute on."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dcgan.numerics import on_cuda

# Of float32 features: on a CPU a block is still cached when a second product reads it; a GPU is kept busy.
BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28}


class NotConvergedError(RuntimeError):
    """A classifier has not come close enough to its minimum; the message says what helps."""


@dataclass(frozen=True)
class Samples:
    """Chosen rows of a feature array, read as (features - mean) * inverse_scale.

    Only one block of rows at a time exists in that form, so 50,000 x 28,672 features are held once and never copied.
    features: float16 or float32 (N, F) on the device that computes. rows: int64 (n,), indices into it, or a slice.
    mean, inverse_scale: float32 (F,), on the same device.
    """

    features: Tensor
    rows: Tensor | slice
    mean: Tensor
    inverse_scale: Tensor

    @classmethod
    def of(cls, features: np.ndarray, device: str = "cpu") -> "Samples":
        """All rows of (N, F), unscaled; copied to the device if that is not the CPU."""
        tensor = torch.from_numpy(features).to(device)
        width = tensor.shape[1]
        return cls(tensor, slice(0, len(tensor)), torch.zeros(width, device=device), torch.ones(width, device=device))

    @classmethod
    def centred(cls, features: np.ndarray, device: str = "cpu") -> "Samples":
        """All rows of (N, F), each feature with mean 0 over them, so that products in float32 lose no digits."""
        plain = cls.of(features, device)
        total = torch.zeros(plain.width, dtype=torch.float64, device=device)
        for _, block in plain.blocks():
            total += block.sum(0, dtype=torch.float64)
        return replace(plain, mean=(total / len(plain)).float())

    @classmethod
    def standardised(cls, features: np.ndarray, device: str = "cpu") -> "Samples":
        """All rows of (N, F), each feature with mean 0 and variance 1 over them; a constant feature becomes 0."""
        centred = cls.centred(features, device)
        squares = torch.zeros(centred.width, dtype=torch.float64, device=device)
        for _, block in centred.blocks():
            squares += block.double().square_().sum(0)
        # Exactly 0 for a constant feature: its mean in float64 rounds to the constant in float32.
        scale = torch.where(squares == 0, 1.0, (squares / len(centred)).sqrt())
        return replace(centred, inverse_scale=(1 / scale).float())

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    @property
    def width(self) -> int:
        """F, the number of features."""
        return self.features.shape[1]

    @property
    def device(self) -> torch.device:
        return self.features.device

    def take(self, rows: np.ndarray) -> "Samples":
        """The samples at these positions of this selection."""
        chosen = torch.from_numpy(rows).to(self.device)
        return replace(self, rows=chosen + self.rows.start if isinstance(self.rows, slice) else self.rows[chosen])

    def like(self, features: np.ndarray) -> "Samples":
        """All rows of other features, with this selection's mean and scale."""
        tensor = torch.from_numpy(features).to(self.device)
        return replace(self, features=tensor, rows=slice(0, len(tensor)))

    def blocks(self, size: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Positions and the samples there, float32 (at most `size`, F); 0: as many as fit the cache.

        A block is overwritten by the next one.
        """
        size = size or max(16, BLOCK_BYTES[self.device.type] // (4 * self.width))
        buffer = torch.empty(min(size, len(self)), self.width, device=self.device)
        for first in range(0, len(self), size):
            where = slice(first, min(first + size, len(self)))
            if isinstance(self.rows, slice):
                chosen = self.features[self.rows.start + where.start : self.rows.start + where.stop]
            else:
                chosen = self.features[self.rows[where]]
            yield where, torch.sub(chosen, self.mean, out=buffer[: len(chosen)]).mul_(self.inverse_scale)

    def parts(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Columns and all samples' features there, float32 (n, at most `size`)."""
        for first in range(0, self.width, size):
            where = slice(first, min(first + size, self.width))
            chosen = self.features[:, where][self.rows]
            yield where, (chosen - self.mean[where]).mul_(self.inverse_scale[where])


_device: ContextVar[str] = ContextVar("device", default="auto")


@contextmanager
def computing_on(wanted: str) -> Iterator[None]:
    """Within the body, protocols compute on an experiment's `compute.device`: auto, cpu or cuda."""
    before = _device.set(wanted)
    try:
        yield
    finally:
        _device.reset(before)


def device(wanted: str = "auto") -> str:
    """`wanted`; if "auto", what `computing_on` says; if that is "auto" too, cuda where there is one, else cpu.

    Raises ValueError for cuda where there is none.
    """
    return "cuda" if on_cuda(wanted if wanted != "auto" else _device.get()) else "cpu"
