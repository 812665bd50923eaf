"""Computes the nets' convolutions in other ways than the library where that makes training on a CPU faster.

Which way is used depends on the processor. Where it does not multiply in bfloat16, float32 layers with many channels
use Winograd's filtering (`winograd.py`), and those at the pixels, with few, one product over patches
(`im2col.py`). Where it does, with AVX-512 BF16 or AMX, the library's kernels are better, except for some
operations: images and their gradients are computed as sub-pixel convolutions (`subpixel.py`), and in bfloat16 the
weight gradients of some layers, with AMX everything of some, as products over patches (`patches.py`).

A conditional net feeds labels to each layer as constant maps; here those maps are never built, because what a label
adds is the same for all images. Everything else is left to the library, and results agree up to rounding.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgan.convolution import im2col, patches, subpixel, winograd
from dcgan.convolution.layer import Layer
from dcgan.convolution.strided import Operations, Strided
from dcgan.numerics import multiplies_bfloat16

# Which layers in bfloat16 are products over patches. With AVX-512 BF16 alone, the weight gradients of those with 256 or
# more channels in the smaller map: with 128, making patches costs as much as the product. With AMX, where the smaller
# map leaves half of a tile's 16 rows empty, every weight gradient, and from 256 channels on all three operations.
WIDE = 256
HALF_A_TILE = 8
PATCHES = 2**25  # most bytes of patches that were measured with AVX-512 BF16 alone

# The time to make Winograd's tiles, in multiplications of a matrix product: per number in the larger map's tiles, in
# the smaller map's, and in the transformed weights. Fitted with AVX2 on 2 cores to layers of 3 to 5 taps, 32 to 512
# channels, 8 to 32 px and 16 to 128 images, whose time is met within 15 % (tests/benchmarks/bench_convolution.py).
# Tiles made for three products (with the weight gradient) cost less each than those made for two.
TILES = {True: (55, 15, 30), False: (90, 30, 35)}
LIMIT = 0.9  # of the direct sum's time, below which Winograd's filtering is used

# Most numbers in a patch of pixels: 4x4 and three channels. With 108 (5x5, made even), the library was faster.
NARROW = 48
COLOURS = 3  # most channels of an image: with 8, a sub-pixel convolution was faster for kernels of 5 alone


class _Labelled(nn.Module, ABC):
    """A convolution without bias, groups or dilation, whose input may end in a one-hot label as constant maps."""

    weight: Tensor
    inputs: int  # the dimension of `weight` that counts the channels of the input

    def forward(self, x: Tensor, onehot: Tensor | None = None) -> Tensor:
        """Convolve x (N, C, H, W), followed, if `onehot` (N, K) is given, by K constant maps of its values."""
        whole = self.weight  # read once: spectral normalisation computes it
        if onehot is None:
            return self._convolve(x, whole)
        weight, labels = whole.split([x.shape[1], onehot.shape[1]], self.inputs)
        if _channels_last(whole):
            weight = weight.contiguous(memory_format=torch.channels_last)
        return self._convolve(x, weight) + self._constant(x.shape[2:], labels.movedim(self.inputs, 0), onehot)

    def _constant(self, size: torch.Size, weight: Tensor, onehot: Tensor) -> Tensor:
        """What the label's maps of that size add, with weight (K, C, kernel, kernel): (N, C, H, W), channels last.

        What a constant map adds depends on the place in the output only by which taps of the kernel reach the map.
        """
        labels, channels, kernel, _ = weight.shape
        taps = torch.eye(kernel**2, dtype=weight.dtype, device=weight.device).view(-1, 1, kernel, kernel)
        reach = self._library(taps.new_ones(1, 1, *size), taps.movedim(1, self.inputs))[0]  # 1, or 0 beyond the border
        maps = reach.flatten(1).T @ weight.permute(0, 2, 3, 1).reshape(labels, -1, channels)
        added = onehot.to(maps.dtype) @ maps.view(labels, -1)
        return added.view(-1, *reach.shape[1:], channels).permute(0, 3, 1, 2)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """By the rules below."""
        transposed = self.inputs == 0
        if (layer := self._geometry(x)) is not None:
            if _by_winograd(x, weight, layer):
                return (winograd.Transposed if transposed else winograd.Convolution).apply(x, weight, layer)
            if _by_im2col(x, weight, layer):
                return (im2col.Transposed if transposed else im2col.Convolution).apply(x, weight, layer)
            if (operations := _operations(x, weight, layer)) != Operations():
                return Strided.apply(*_cast(x, weight), layer, operations, transposed)
        return self._library(x, weight)

    @abstractmethod
    def _geometry(self, x: Tensor) -> Layer | None:
        """The layer, if it halves or doubles the map x."""

    @abstractmethod
    def _library(self, x: Tensor, weight: Tensor) -> Tensor:
        """As PyTorch does."""


class Conv2d(_Labelled, nn.Conv2d):
    """`nn.Conv2d` without bias, groups and dilation."""

    inputs = 1

    def _geometry(self, x: Tensor) -> Layer | None:
        layer = _layer(self, x.shape[2] // 2, x.shape[3] // 2)
        halves = self.stride[0] == 2 and layer.output_padding in (0, 1) and not (x.shape[2] % 2 or x.shape[3] % 2)
        return layer if halves else None

    def _library(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding)


class ConvTranspose2d(_Labelled, nn.ConvTranspose2d):  # type: ignore[misc]
    """The same for `nn.ConvTranspose2d`."""

    inputs = 0

    def _geometry(self, x: Tensor) -> Layer | None:
        layer = _layer(self, x.shape[2], x.shape[3])
        return layer if self.stride[0] == 2 and layer.output_padding == self.output_padding[0] else None

    def _library(self, x: Tensor, weight: Tensor) -> Tensor:
        assert isinstance(self.padding, tuple)
        return F.conv_transpose2d(x, weight, None, self.stride, self.padding, self.output_padding)


def _layer(module: nn.Conv2d | nn.ConvTranspose2d, height: int, width: int) -> Layer:
    """The layer between a larger map and a smaller one of that height and width."""
    return Layer(module.kernel_size[0], int(module.padding[0]), height, width)


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution of x on the CPU computes."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _cast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in that dtype: what forward saves is what backward computes with, where autocast is off."""
    return x.to(_dtype(x)), weight.to(_dtype(x))


def _channels_last(weight: Tensor) -> bool:
    """Whether the weight is channels last; with one channel only the strides tell which format was asked for."""
    return weight.is_contiguous(memory_format=torch.channels_last) and weight.stride(1) == 1


def _by_winograd(x: Tensor, weight: Tensor, layer: Layer) -> bool:
    """Whether a gradient is wanted and Winograd's filtering is faster. Without gradients it hardly is.

    Nor is it on processors that multiply in bfloat16: on an AMD EPYC with AVX-512 BF16 it takes 1.4 times as long,
    because the library's direct sum there reaches twice the rate of a matrix product.
    """
    if not (x.device.type == "cpu" and torch.is_grad_enabled() and _dtype(x) == torch.float32):
        return False
    if multiplies_bfloat16(x.device):
        return False
    if not (weight.requires_grad or x.requires_grad) or not _channels_last(weight):
        return False
    return winograd_time(len(x), weight, layer) < LIMIT


def winograd_time(images: int, weight: Tensor, layer: Layer) -> float:
    """Expected time of the layer's convolution and gradients by Winograd's filtering, relative to the library's."""
    count, channels = weight.shape[:2]
    large, small, weights = TILES[weight.requires_grad]
    tiled = winograd.Tiled(*layer)
    tiles = tiled.tiles[0] * tiled.tiles[1]
    products = 4 * tiled.n**2 * tiles * (1 + large / count + small / channels + weights / (images * tiles))
    return products / (layer.height * layer.width * layer.kernel**2)


def _by_im2col(x: Tensor, weight: Tensor, layer: Layer) -> bool:
    """Whether the larger map has so few channels that one product over patches is faster."""
    if not (x.device.type == "cpu" and _dtype(x) == torch.float32 and _channels_last(weight)):
        return False
    return im2col.columns(weight, layer) <= NARROW and not multiplies_bfloat16(x.device)


def _operations(x: Tensor, weight: Tensor, layer: Layer) -> Operations:
    """Which operations of the layer are ours, on a processor that multiplies in bfloat16.

    AVX-512 without bfloat16 was never measured: such processors are treated as those with AVX2.
    """
    if not (x.device.type == "cpu" and _channels_last(weight) and multiplies_bfloat16(x.device)):
        return Operations()
    dtype, (count, channels, kernel, _) = _dtype(x), weight.shape
    if channels <= COLOURS:
        return Operations(larger=subpixel.larger) if dtype in (torch.float32, torch.bfloat16) else Operations()
    if dtype != torch.bfloat16:
        return Operations()
    if torch.cpu._is_amx_tile_supported():
        by_patches = layer.width <= HALF_A_TILE
        if by_patches and count >= WIDE:
            return Operations(patches.smaller, patches.larger, patches.weight_gradient)
    else:
        values = len(x) * layer.height * layer.width * channels * kernel**2
        by_patches = count >= WIDE and values * dtype.itemsize <= PATCHES
    return Operations(weight_gradient=patches.weight_gradient) if by_patches else Operations()
