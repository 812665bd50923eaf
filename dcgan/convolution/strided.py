"""Stride-2 layers put together from three operations, each of which is PyTorch's or computed in another way.

A layer joins a larger map (N, D, 2h, 2w) and a smaller one (N, C, h, w) by a weight (C, D, kernel, kernel). A
convolution computes the smaller map and needs the larger one as a gradient; its transpose does the opposite. Both need
the weight's gradient, which depends on the two maps alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dcgan.convolution.layer import Layer


def smaller(large: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """The smaller map, by PyTorch."""
    return F.conv2d(large, weight, None, 2, layer.padding)


def larger(small: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """The larger map, by PyTorch."""
    return F.conv_transpose2d(small, weight, None, 2, layer.padding, layer.output_padding)


def weight_gradient(small: Tensor, large: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """The weight's gradient, by PyTorch; `weight` only says what it is like."""
    sides = [layer.padding] * 2
    _, gradient, _ = torch.ops.aten.convolution_backward(
        small, large, weight, None, (2, 2), sides, (1, 1), False, (0, 0), 1, (False, True, False)
    )
    return gradient


class Operations(NamedTuple):
    """How a layer is computed."""

    smaller: Callable[[Tensor, Tensor, Layer], Tensor] = smaller
    larger: Callable[[Tensor, Tensor, Layer], Tensor] = larger
    weight_gradient: Callable[[Tensor, Tensor, Tensor, Layer], Tensor] = weight_gradient


class Strided(torch.autograd.Function):
    """x and weight to the smaller map as `F.conv2d` with stride 2, or to the larger one as `F.conv_transpose2d`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Layer, operations: Operations, transposed: bool) -> Tensor:
        ctx.layer, ctx.operations, ctx.transposed = layer, operations, transposed
        ctx.save_for_backward(x, weight)
        return (operations.larger if transposed else operations.smaller)(x, weight, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), layer, operations = ctx.saved_tensors, ctx.layer, ctx.operations
        back = operations.smaller if ctx.transposed else operations.larger
        small, large = (x, gradient) if ctx.transposed else (gradient, x)
        return (
            back(gradient, weight, layer) if ctx.needs_input_grad[0] else None,
            operations.weight_gradient(small, large, weight, layer) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
        )
