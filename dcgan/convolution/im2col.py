"""Computes stride-2 convolutions at the pixels as one matrix product over patches (im2col and col2im).

A layer between images of one or three channels and maps of many is too narrow for the library's kernels. Here each
position of the smaller map is a row, its patch of the image, of even height and width; the weights are one matrix.

In memory a batch is (N, H, W, C), "channels last".
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dcgan.convolution.layer import Layer, empty, rows_of


class Convolution(torch.autograd.Function):
    """x (N, D, 2h, 2w), weight (C, D, kernel, kernel) to (N, C, h, w), as `F.conv2d` with stride 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
        patches, matrix = _cut(x, layer), _matrix(weight, layer)
        ctx.layer = layer
        ctx.save_for_backward(matrix, *([patches] if ctx.needs_input_grad[1] else []))
        return _maps(patches, matrix, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (matrix, *patches), rows = ctx.saved_tensors, rows_of(gradient)
        return (
            _spread(rows @ matrix, ctx.layer) if ctx.needs_input_grad[0] else None,
            ctx.layer.kernels(rows.T @ patches[0]) if ctx.needs_input_grad[1] else None,
            None,
        )


class Transposed(torch.autograd.Function):
    """x (N, C, h, w), weight (C, D, kernel, kernel) to (N, D, 2h, 2w), as `F.conv_transpose2d` with stride 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
        rows, matrix = rows_of(x), _matrix(weight, layer)
        ctx.layer = layer
        ctx.save_for_backward(matrix, rows)
        return _spread(rows @ matrix, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (matrix, rows), patches = ctx.saved_tensors, _cut(gradient, ctx.layer)
        return (
            _maps(patches, matrix, ctx.layer) if ctx.needs_input_grad[0] else None,
            ctx.layer.kernels(rows.T @ patches) if ctx.needs_input_grad[1] else None,
            None,
        )


def columns(weight: Tensor, layer: Layer) -> int:
    """Numbers in a patch, whose side is that of the kernel rounded up to even."""
    return weight.shape[1] * (2 * layer.r) ** 2


def _matrix(weight: Tensor, layer: Layer) -> Tensor:
    """(C, D, kernel, kernel) to (C, columns)."""
    return layer.pairs(weight).reshape(len(weight), -1)


def _maps(patches: Tensor, matrix: Tensor, layer: Layer) -> Tensor:
    """The product, (N, C, h, w)."""
    count = len(patches) // (layer.height * layer.width)
    out = empty(patches, count, len(matrix), layer.height, layer.width)
    torch.mm(patches, matrix.T, out=rows_of(out))
    return out


def _cut(large: Tensor, layer: Layer) -> Tensor:
    """(N, D, 2h, 2w) to (N h w, columns)."""
    side, before = 2 * layer.r, layer.padding
    after = side - 2 - before
    padded = F.pad(large.permute(0, 2, 3, 1), (0, 0, before, after, before, after)).contiguous()
    count, _, _, channels = padded.shape
    a, b, c, d = padded.stride()
    size = (count, layer.height, layer.width, side, side * channels)
    return padded.as_strided(size, (a, 2 * b, 2 * c, b, d)).reshape(-1, side * side * channels)


def _spread(rows: Tensor, layer: Layer) -> Tensor:
    """The transpose of `_cut`: (N h w, columns) to (N, D, 2h, 2w), summed where patches overlap."""
    (_, before, height, width), r, over = layer, layer.r, layer.r - 1
    parts = rows.view(-1, height, width, r, 2, r, rows.shape[1] // (2 * r * r))  # of 2 x 2 pixels each
    total = rows.new_empty(len(parts), height + over, 2, width + over, parts.shape[-1])
    total[:, height:].zero_()
    total[:, :height, :, width:].zero_()
    total[:, :height, :, :width] = parts[:, :, :, 0, :, 0].transpose(2, 3)
    for i in range(r):
        for j in range(r):
            if i or j:
                total[:, i : i + height, :, j : j + width] += parts[:, :, :, i, :, j].transpose(2, 3)
    pixels = total.view(len(parts), 2 * (height + over), 2 * (width + over), -1)
    out = empty(rows, len(parts), pixels.shape[-1], 2 * height, 2 * width)
    out.permute(0, 2, 3, 1).copy_(pixels[:, before : before + 2 * height, before : before + 2 * width])
    return out
