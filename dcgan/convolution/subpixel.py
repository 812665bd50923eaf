"""Computes transposed stride-2 convolutions to the pixels as ordinary ones: sub-pixel convolution (Shi et al. 2016).

Each position of the smaller map becomes 2 x 2 pixels, and what these depend on lies within a window of 3 x 3 positions.
So the transpose is a convolution of the smaller map with four times the channels, which are then rearranged. To images
of one or three channels that is faster than the library, whose kernels compute a vector of channels at a time, although
for a kernel of 4 or 3 more than half of the weights are zero. It is also how the gradient of an image is computed.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dcgan.convolution.layer import Layer


def larger(small: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """(N, C, h, w) and (C, D, kernel, kernel) to (N, D, 2h, 2w), as `F.conv_transpose2d` with stride 2."""
    taps = _taps(layer.kernel, layer.padding)
    windows = F.pad(weight, (0, 1, 0, 1))[:, :, taps][..., taps]  # (C, D, 2, 3, 2, 3): of each of the 2 x 2 pixels
    kernels = windows.permute(1, 2, 4, 0, 3, 5).reshape(-1, len(weight), 3, 3)
    return F.pixel_shuffle(F.conv2d(small, kernels.contiguous(memory_format=torch.channels_last), None, 1, 1), 2)


@cache
def _taps(kernel: int, padding: int) -> Tensor:
    """int64 (2, 3): which tap of the kernel joins the first or second pixel of a position with its three neighbours.

    `kernel`, one beyond the last, for none.
    """
    rows = [[pixel + padding - 2 * neighbour for neighbour in (-1, 0, 1)] for pixel in (0, 1)]
    return torch.tensor([[tap if 0 <= tap < kernel else kernel for tap in row] for row in rows])
