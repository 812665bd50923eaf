"""Computes the nets' convolutions in other ways than the library where that makes training on a CPU faster.

Which way is used depends on the processor. Where it does not multiply in bfloat16, float32 layers with many channels
use Winograd's filtering (`dcgan/winograd.py`), and those at the pixels, with few, one product over patches
(`dcgan/im2col.py`). Where it does, with AVX-512 BF16 or AMX, the library's kernels are better, except for two
operations: transposed convolutions to images, done as sub-pixel convolutions (`dcgan/subpixel.py`), and the weight
gradients of some layers in bfloat16, done as one product over patches.

A conditional net feeds labels to each layer as constant maps; here those maps are never built, because what a label
adds is the same for all images. Everything else is left to the library, and results agree up to rounding.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dcgan import im2col, subpixel, winograd
from dcgan.numerics import multiplies_bfloat16
from dcgan.winograd import Layer

# For which weight gradients a product over patches is faster than oneDNN: the fewest channels of the smaller map, and
# the most bytes of patches, with AMX and with AVX-512 BF16 alone. With AMX, where oneDNN takes two to five times as
# long, 2**25 bytes were slower. Without it, 128 channels were: making the patches costs as much as the product.
PATCHES_AMX, PATCHES_AVX512 = (1, 2**24), (256, 2**25)

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

    @abstractmethod
    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """By the rules below."""

    @abstractmethod
    def _library(self, x: Tensor, weight: Tensor) -> Tensor:
        """As PyTorch does."""


class Conv2d(_Labelled, nn.Conv2d):
    """`nn.Conv2d` without bias, groups and dilation."""

    inputs = 1

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.stride[0] == 2 and not (x.shape[2] % 2 or x.shape[3] % 2):
            layer = _layer(self, x.shape[2] // 2, x.shape[3] // 2)
            if _by_winograd(x, weight, layer):
                return winograd.Convolution.apply(x, weight, layer)
            if _by_im2col(x, weight, layer):
                return im2col.Convolution.apply(x, weight, layer)
            if _by_subpixel(x, weight):
                return subpixel.Convolution.apply(*_cast(x, weight), layer)
        if not _gradient_by_im2col(x, weight, self.stride[0], x.shape):
            return self._library(x, weight)
        return _Im2colGradient.apply(*_cast(x, weight), self.stride, self.padding, None)

    def _library(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding)


class ConvTranspose2d(_Labelled, nn.ConvTranspose2d):  # type: ignore[misc]
    """The same for `nn.ConvTranspose2d`."""

    inputs = 0

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.stride[0] == 2:
            layer = _layer(self, x.shape[2], x.shape[3])
            if _by_winograd(x, weight, layer):
                return winograd.Transposed.apply(x, weight, layer)
            if _by_im2col(x, weight, layer):
                return im2col.Transposed.apply(x, weight, layer)
            if _by_subpixel(x, weight):
                return subpixel.Transposed.apply(*_cast(x, weight), layer)
        size = torch.Size([x.shape[0], self.out_channels, *(self.stride[0] * side for side in x.shape[2:])])
        if not _gradient_by_im2col(x, weight, self.stride[0], size):
            return self._library(x, weight)
        return _Im2colGradient.apply(*_cast(x, weight), self.stride, self.padding, self.output_padding)

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
    tiles = layer.tiles[0] * layer.tiles[1]
    products = 4 * layer.n**2 * tiles * (1 + large / count + small / channels + weights / (images * tiles))
    return products / (layer.height * layer.width * layer.kernel**2)


def _by_im2col(x: Tensor, weight: Tensor, layer: Layer) -> bool:
    """Whether the larger map has so few channels that one product over patches is faster."""
    if not (x.device.type == "cpu" and _dtype(x) == torch.float32 and _channels_last(weight)):
        return False
    return im2col.columns(weight, layer) <= NARROW and not multiplies_bfloat16(x.device)


def _by_subpixel(x: Tensor, weight: Tensor) -> bool:
    """Whether the larger map is an image, on a processor whose vectors are far wider than its channels.

    AVX-512 without bfloat16 was never measured: such processors are treated as those with AVX2.
    """
    if not (x.device.type == "cpu" and _dtype(x) in (torch.float32, torch.bfloat16) and _channels_last(weight)):
        return False
    return weight.shape[1] <= COLOURS and multiplies_bfloat16(x.device)


def _gradient_by_im2col(x: Tensor, weight: Tensor, stride: int, large: torch.Size) -> bool:
    """Whether the weight gradient is wanted and faster by patches of the larger map, of size `large` (N, C, H, W)."""
    if not (x.device.type == "cpu" and torch.is_grad_enabled() and weight.requires_grad):
        return False
    if _dtype(x) != torch.bfloat16 or not multiplies_bfloat16(x.device):
        return False
    fewest, largest = PATCHES_AMX if torch.cpu._is_amx_tile_supported() else PATCHES_AVX512
    images, channels, height, width = large
    values = images * (height // stride) * (width // stride) * channels * weight.shape[2] * weight.shape[3]
    return stride > 1 and channels > COLOURS and len(weight) >= fewest and values * _dtype(x).itemsize <= largest


class _Im2colGradient(torch.autograd.Function):
    """A convolution (with an output padding, its transpose) of x (N, C, H, W) in channels-last memory."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        output_padding: tuple[int, int] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, output_padding
        if output_padding is None:
            return F.conv2d(x, weight, None, stride, padding)
        return F.conv_transpose2d(x, weight, None, stride, padding, output_padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, output_padding = ctx.geometry
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            transposed = output_padding is not None
            x_gradient = torch.ops.aten.convolution_backward(
                gradient, x, weight, [0], stride, padding, (1, 1), transposed, output_padding or (0, 0), 1,
                (True, False, False),
            )[0]  # fmt: skip
        if ctx.needs_input_grad[1]:
            small, large = (gradient, x) if output_padding is None else (x, gradient)
            weight_gradient = _product(small, large, weight.shape[2], stride[0], padding[0])
        return x_gradient, weight_gradient, None, None, None


def _product(small: Tensor, large: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """The weight gradient (C, D, kernel, kernel) of maps small (N, C, h, w) and large (N, D, H, W)."""
    padded = F.pad(large.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    images, _, _, channels = padded.shape
    a, b, c, d = padded.stride()
    count, height, width = small.shape[1:]
    views = padded.as_strided((images, height, width, kernel, kernel, channels), (a, stride * b, stride * c, b, c, d))
    rows = small.permute(0, 2, 3, 1).reshape(-1, count)
    product = rows.T @ views.reshape(len(rows), -1)
    return product.view(count, kernel, kernel, channels).permute(0, 3, 1, 2)
