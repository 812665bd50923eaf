"""The geometry of a stride-2 convolution or its transpose, and what several ways to compute one need.

In memory a batch is (N, H, W, C), "channels last".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layer(NamedTuple):
    """The geometry of a convolution from a larger map (N, D, 2h, 2w) to a smaller one (N, C, h, w)."""

    kernel: int
    padding: int
    height: int  # h
    width: int  # w

    @property
    def output_padding(self) -> int:
        """Of the transposed convolution, so that it doubles the map."""
        return 2 + 2 * self.padding - self.kernel

    @property
    def r(self) -> int:
        """How many pairs of pixels a kernel spans."""
        return (self.kernel + 1) // 2

    def pairs(self, weight: Tensor) -> Tensor:
        """(C, D, kernel, kernel) to (C, r, 2, r, 2, D), an odd kernel padded with zeros at its end."""
        more, r, (count, channels) = 2 * self.r - self.kernel, self.r, weight.shape[:2]
        return F.pad(weight.permute(0, 2, 3, 1), (0, 0, 0, more, 0, more)).view(count, r, 2, r, 2, channels)

    def kernels(self, pairs: Tensor) -> Tensor:
        """The transpose of `pairs`."""
        pixels = pairs.reshape(len(pairs), 2 * self.r, 2 * self.r, -1)
        return pixels[:, : self.kernel, : self.kernel].permute(0, 3, 1, 2)


def rows_of(small: Tensor) -> Tensor:
    """(N, C, h, w) to (N h w, C), a view if it is channels last."""
    return small.permute(0, 2, 3, 1).reshape(-1, small.shape[1])


def empty(like: Tensor, *size: int) -> Tensor:
    """A tensor that is not a view of another, so that what follows may work in place."""
    return torch.empty(size, dtype=like.dtype, memory_format=torch.channels_last)
