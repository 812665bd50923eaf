"""Computes the three operations of a stride-2 layer of many channels as products of matrices over patches, in bfloat16.

AMX multiplies tiles of 16 rows. The library's kernels fill them with positions of one row of the smaller map, so that
maps of 8 and 4 px leave half and three quarters of a tile empty, and their weight gradients are slower still. Here all
positions of all images are rows of one matrix, whose patches are made for some images at a time.

The larger map is a sum over patches that overlap, which would be rounded once per patch. Instead, each of the 2 x 2
pixels that belong to a position of the smaller map is a product over those of its neighbours that reach it, rounded
once. In memory a batch is (N, H, W, C), "channels last".
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dcgan.convolution.layer import Layer, empty, rows_of

PART = 2**25  # bytes of patches at a time, to bound memory; 2**22 was slower, all at once hardly faster


def smaller(large: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """(N, D, 2h, 2w) and (C, D, kernel, kernel) to (N, C, h, w), as `F.conv2d` with stride 2."""
    matrix = weight.permute(2, 3, 1, 0).reshape(-1, len(weight))
    out = empty(large, len(large), len(weight), layer.height, layer.width)
    for part in _parts(large, len(matrix), layer):
        torch.mm(_patches(large[part], layer), matrix, out=rows_of(out[part]))
    return out


def larger(small: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """(N, C, h, w) and (C, D, kernel, kernel) to (N, D, 2h, 2w), as `F.conv_transpose2d` with stride 2."""
    count, channels, height, width = small.shape
    padded = F.pad(small.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    a, b, c, d = padded.stride()
    taps = weight.permute(2, 3, 0, 1).flip(0, 1)
    out = empty(small, count, weight.shape[1], 2 * height, 2 * width)
    pixels = out.permute(0, 2, 3, 1)
    for y, x in itertools.product((0, 1), (0, 1)):
        (top, rows, first), (left, columns, second) = _reach(layer, y), _reach(layer, x)
        matrix = taps[first : first + 2 * rows : 2, second : second + 2 * columns : 2].reshape(-1, weight.shape[1])
        size, strides = (count, height, width, rows, columns * channels), (a, b, c, b, d)
        windows = padded.as_strided(size, strides, top * b + left * c)
        for part in _parts(small, len(matrix), layer):
            product = windows[part].reshape(-1, len(matrix)) @ matrix
            pixels[part, y::2, x::2] = product.view(-1, height, width, weight.shape[1])
    return out


def weight_gradient(small: Tensor, large: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """That of a weight like the one given, from (N, C, h, w) and (N, D, 2h, 2w).

    Each part is rounded, their sum is in float32.
    """
    length = weight[0].numel()
    total = torch.zeros(len(weight), length, dtype=torch.promote_types(large.dtype, torch.float32))
    for part in _parts(large, length, layer):
        total += rows_of(small[part]).T @ _patches(large[part], layer)
    return total.to(large.dtype).view(len(weight), layer.kernel, layer.kernel, -1).permute(0, 3, 1, 2)


def _parts(like: Tensor, length: int, layer: Layer) -> Iterator[slice]:
    """Images whose patches, of that many numbers, are made together."""
    step = max(1, PART // (layer.height * layer.width * length * like.itemsize))
    return (slice(first, first + step) for first in range(0, len(like), step))


def _patches(large: Tensor, layer: Layer) -> Tensor:
    """(N, D, 2h, 2w) to (N h w, kernel kernel D)."""
    (kernel, padding, height, width), channels = layer, large.shape[1]
    padded = F.pad(large.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).contiguous()
    a, b, c, d = padded.stride()
    views = padded.as_strided((len(large), height, width, kernel, kernel * channels), (a, 2 * b, 2 * c, b, d))
    return views.reshape(-1, kernel * kernel * channels)


def _reach(layer: Layer, pixel: int) -> tuple[int, int, int]:
    """Which positions reach the first (0) or second (1) pixel of a position: the first, counted from the one before;
    how many; and the tap of the reversed kernel that joins the first."""
    taps = {neighbour: pixel + layer.padding - 2 * neighbour for neighbour in (-1, 0, 1)}
    reached = [neighbour for neighbour, tap in taps.items() if 0 <= tap < layer.kernel]
    return reached[0] + 1, len(reached), layer.kernel - 1 - taps[reached[0]]
