"""Computes stride-2 convolutions by Winograd's minimal filtering, with fewer multiplications than the direct sum.

A convolution of stride 2 is one of stride 1 over pixels taken two by two, in both directions, with a kernel of half the
size: r = 2 for kernels of 3 and 4, 3 for those of 5. Tiles of m x m outputs are then F(m x m, r x r) of Lavin and Gray
(2016), section 4: y = A' [(G w) . (B' x)], whose (m + r - 1)^2 products replace m^2 r^2. The sums over channels are
products of matrices. The three gradients are those of the same bilinear form, so everything here is one of four maps
(to tiles and from tiles, of the larger and of the smaller side) around a product.

A batch is processed in parts whose tiles stay in the processor's cache.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dcgan.convolution.layer import Layer

M = 4  # outputs per side of a tile; larger tiles lose more precision in float32, and divide fewer maps evenly
POINTS = {2: (0, 1, -1, 2), 3: (0, 1, -1, 2, -2)}  # where the polynomials are evaluated, besides infinity
PART = 2**25  # bytes of the tiles of a part; 2**22 and less were slower at 32 px


class Form(NamedTuple):
    """Matrices of both directions at once, n = M + r - 1: inputs (n^2, n^2), weights (n^2, r^2), outputs (M^2, n^2)."""

    inputs: Tensor
    weights: Tensor
    outputs: Tensor


@cache
def form(r: int, dtype: torch.dtype) -> Form:
    """F(M x M, r x r) by Toom and Cook: polynomials multiplied by their values at POINTS and infinity, transposed."""

    def values(length: int) -> Tensor:
        rows = [[float(point) ** power for power in range(length)] for point in POINTS[r]]
        return torch.tensor([*rows, [0.0] * (length - 1) + [1.0]], dtype=torch.float64)

    sides = torch.linalg.inv(values(M + r - 1)).T, values(r), values(M).T
    return Form(*(torch.kron(side, side).to(dtype) for side in sides))


class Tiled(Layer):
    """A layer whose maps are cut into tiles, n x n pairs of pixels of the larger for M x M of the smaller."""

    @property
    def n(self) -> int:
        return M + self.r - 1

    @property
    def tiles(self) -> tuple[int, int]:
        return -(-self.height // M), -(-self.width // M)

    def weights(self, weight: Tensor) -> Tensor:
        """(C, D, kernel, kernel) to (C, n^2, 4 D): G w."""
        pairs = self.pairs(weight).transpose(2, 3)
        return _transform(form(self.r, weight.dtype).weights, pairs.reshape(len(pairs), self.r**2, -1))

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        """(C, n^2, 4 D) to (C, D, kernel, kernel): the transpose of `weights`."""
        rows = _transform(form(self.r, gradient.dtype).weights.T, gradient)
        return self.kernels(rows.view(len(rows), self.r, self.r, 2, 2, -1).transpose(2, 3))

    def large_to_tiles(self, large: Tensor) -> Tensor:
        """(N, 2h, 2w, D) to (N tiles, n^2, 4 D): B' x."""
        (rows, columns), n, (count, height, width, channels) = self.tiles, self.n, large.shape
        before, below, right = self.padding, self.padding + height, self.padding + width
        padded = large.new_empty(count, 2 * (M * rows + n - M), 2 * (M * columns + n - M), channels)
        padded[:, before:below, before:right] = large
        for edge in (padded[:, :before], padded[:, below:], padded[:, :, :before], padded[:, :, right:]):
            edge.zero_()
        a, b, c, d = padded.stride()
        size = (count, rows, columns, n, n, 2, 2 * channels)
        tiles = padded.as_strided(size, (a, 2 * M * b, 2 * M * c, 2 * b, 2 * c, b, d))
        return _transform(form(self.r, large.dtype).inputs, tiles.reshape(-1, n * n, 4 * channels))

    def tiles_to_large(self, tiles: Tensor, out: Tensor) -> None:
        """The transpose of `large_to_tiles`, into (N, 2h, 2w, D): tiles are summed where they overlap."""
        (rows, columns), n, over = self.tiles, self.n, self.r - 1
        count, height, width, channels = out.shape
        found = _transform(form(self.r, out.dtype).inputs.T, tiles)
        found = found.view(count, rows, columns, n, n, 2, 2 * channels).permute(0, 1, 5, 2, 6, 3, 4)
        total = out.new_empty(count, M * rows + over, 2, M * columns + over, 2 * channels)
        total[:, M * rows :].zero_()
        total[:, : M * rows, :, M * columns :].zero_()
        windows = total.unfold(1, n, M).unfold(3, n, M)  # (N, rows, 2, columns, 2 D, n, n), which overlap
        windows[..., :M, :M] = found[..., :M, :M]
        windows[..., M:, :M] += found[..., M:, :M]
        windows[..., :M, M:] += found[..., :M, M:]
        windows[..., M:, M:] += found[..., M:, M:]
        pixels = total.view(count, 2 * (M * rows + over), 2 * (M * columns + over), channels)
        out.copy_(pixels[:, self.padding : self.padding + height, self.padding : self.padding + width])

    def small_to_tiles(self, small: Tensor) -> Tensor:
        """(N, h, w, C) to (N tiles, n^2, C): the transpose of A'."""
        (rows, columns), (count, height, width, channels) = self.tiles, small.shape
        padded = F.pad(small, (0, 0, 0, M * columns - width, 0, M * rows - height))
        tiles = padded.view(count, rows, M, columns, M, channels).transpose(2, 3).reshape(-1, M * M, channels)
        return _transform(form(self.r, small.dtype).outputs.T, tiles)

    def tiles_to_small(self, tiles: Tensor, out: Tensor) -> None:
        """A', into (N, h, w, C)."""
        (rows, columns), (count, height, width, channels) = self.tiles, out.shape
        found = _transform(form(self.r, out.dtype).outputs, tiles)
        found = found.view(count, rows, columns, M, M, channels).transpose(2, 3)
        if (M * rows, M * columns) == (height, width):
            out.view(found.shape).copy_(found)
        else:
            out.copy_(found.reshape(count, M * rows, M * columns, channels)[:, :height, :width])

    def parts(self, count: int, channels: int, itemsize: int) -> Iterator[slice]:
        """Slices of `count` images with `channels` = D, of about the same size."""
        rows, columns = self.tiles
        each = self.n**2 * rows * columns * 4 * channels * itemsize
        number = -(-count * each // PART)
        size = -(-count // number)
        return (slice(i, min(i + size, count)) for i in range(0, count, size))


class _Filtering(torch.autograd.Function):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradient of x is the other of the two operations; that of the weights a product of both sides' tiles."""
        (weights, *kept), layer, back = ctx.saved_tensors, ctx.layer, not ctx.to_large
        out = _empty(gradient, weights, layer, back) if ctx.needs_input_grad[0] else None
        total = None
        for i, tiles in enumerate(_parts(gradient, weights, layer, back, out)):
            if ctx.needs_input_grad[1]:
                small, large = (tiles, kept[i]) if back else (kept[i], tiles)
                small, large = small.permute(1, 2, 0), large.transpose(0, 1)
                total = small @ large if total is None else total.baddbmm_(small, large)
        return out, None if total is None else layer.weight_gradient(total.transpose(0, 1)), None


class Convolution(_Filtering):
    """x (N, D, 2h, 2w), weight (C, D, kernel, kernel) to (N, C, h, w), as `F.conv2d` with stride 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
        return _forward(ctx, x, weight, layer, to_large=False)


class Transposed(_Filtering):
    """x (N, C, h, w), weight (C, D, kernel, kernel) to (N, D, 2h, 2w), as `F.conv_transpose2d` with stride 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
        return _forward(ctx, x, weight, layer, to_large=True)


def _forward(ctx: Any, x: Tensor, weight: Tensor, layer: Layer, to_large: bool) -> Tensor:
    tiled = Tiled(*layer)
    weights = tiled.weights(weight)
    out = _empty(x, weights, tiled, to_large)
    kept = [tiles for tiles in _parts(x, weights, tiled, to_large, out) if ctx.needs_input_grad[1]]
    ctx.layer, ctx.to_large = tiled, to_large
    ctx.save_for_backward(weights, *kept)
    return out


def _parts(x: Tensor, weights: Tensor, layer: Tiled, to_large: bool, out: Tensor | None) -> Iterator[Tensor]:
    """Write the convolution of x (if `to_large`, its transpose) into `out` if given; yields the tiles of x by parts."""
    pixels = _pixels(x)
    for part in layer.parts(len(x), weights.shape[2] // 4, x.itemsize):
        tiles = layer.small_to_tiles(pixels[part]) if to_large else layer.large_to_tiles(pixels[part])
        if out is not None and to_large:
            layer.tiles_to_large(_channels(tiles, weights.transpose(0, 1)), _pixels(out)[part])
        elif out is not None:
            layer.tiles_to_small(_channels(tiles, weights.permute(1, 2, 0)), _pixels(out)[part])
        yield tiles


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C), a view if that is how it lies in memory."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _empty(x: Tensor, weights: Tensor, layer: Layer, large: bool) -> Tensor:
    """Uninitialised memory for the larger or the smaller map of as many images as x."""
    times, channels = (2, weights.shape[2] // 4) if large else (1, len(weights))
    size = len(x), channels, times * layer.height, times * layer.width
    return torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)


def _transform(matrix: Tensor, tiles: Tensor) -> Tensor:
    """A matrix (a, b) times each of the tiles (T, b, K), whose values lie side by side, and in the cache."""
    return torch.bmm(matrix.expand(len(tiles), -1, -1), tiles)


def _channels(tiles: Tensor, weights: Tensor) -> Tensor:
    """Sums over channels: (T, n^2, K) and (n^2, K, L) to (T, n^2, L)."""
    return (tiles.transpose(0, 1) @ weights).transpose(0, 1)
