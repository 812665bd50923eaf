"""Convolutions of stride 2 in our ways beside PyTorch's.

A way is a module (`winograd`, `im2col`), or the operations that it computes (`strided`).
"""

import torch
import torch.nn.functional as F

from dcgan.convolution import patches, subpixel
from dcgan.convolution.layer import Layer
from dcgan.convolution.strided import Operations, Strided
from dcgan.models import GEOMETRY

BY_SUBPIXEL = Operations(larger=subpixel.larger)
BY_PATCHES = Operations(patches.smaller, patches.larger, patches.weight_gradient)


def with_gradients(apply, x, weight, dtype=None):
    """y, and the gradients of x and the weight for a random one of y, in `dtype` or y's, that is always the same."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = apply(x, weight)
    torch.manual_seed(1)
    return y, *torch.autograd.grad(y, (x, weight), torch.randn(y.shape).to(dtype or y.dtype).to(y.dtype))


def case(way, kernel, count, channels, larger, height, width, transposed, dtype=torch.float64):
    """x, weight, PyTorch's operation and ours."""
    padding, more = GEOMETRY[kernel]
    layer = Layer(kernel, padding, height, width)
    weight = torch.randn(channels, larger, kernel, kernel, dtype=dtype)
    if transposed:
        x = torch.randn(count, channels, height, width, dtype=dtype)
        plain = lambda x, w: F.conv_transpose2d(x, w, None, 2, padding, more)  # noqa: E731
        return x, weight, plain, _apply(way, layer, True)
    x = torch.randn(count, larger, 2 * height, 2 * width, dtype=dtype)
    return x, weight, lambda x, w: F.conv2d(x, w, None, 2, padding), _apply(way, layer, False)


def beside_float64(way, kernel, count, channels, larger, height, width, transposed, dtype):
    """Ours, PyTorch's, and PyTorch's in float64: of y, and of the gradients of x and the weight."""
    torch.manual_seed(0)
    x, weight, theirs, ours = case(way, kernel, count, channels, larger, height, width, transposed, dtype)
    exact = with_gradients(theirs, x.double(), weight.double(), dtype)
    return zip(with_gradients(ours, x, weight), with_gradients(theirs, x, weight), exact, strict=True)


def _apply(way, layer, transposed):
    if isinstance(way, Operations):
        return lambda x, w: Strided.apply(x, w, layer, way, transposed)
    function = way.Transposed if transposed else way.Convolution
    return lambda x, w: function.apply(x, w, layer)


def recorded(monkeypatch, way):
    """A list that gets the names of a module's functions as they are used."""
    calls = []
    for function in (way.Convolution, way.Transposed):
        apply = function.apply
        monkeypatch.setattr(
            function, "apply", lambda *args, a=apply, name=function.__name__: calls.append(name) or a(*args)
        )
    return calls


def recorded_operations(monkeypatch, way):
    """The same for a module's operations."""
    calls = []
    for name in Operations._fields:
        if operation := getattr(way, name, None):
            monkeypatch.setattr(way, name, lambda *args, o=operation, n=name: calls.append(n) or o(*args))
    return calls


PROCESSORS = {
    "AVX2": (),
    "AVX-512": ("avx512",),
    "AVX-512 BF16": ("avx512", "avx512_bf16"),
    "AMX": ("avx512", "avx512_bf16", "amx_tile"),
}


def on_processor(monkeypatch, name):
    """Make the rules choose as on a processor with these instructions."""
    for instructions in PROCESSORS["AMX"]:
        has = instructions in PROCESSORS[name]
        monkeypatch.setattr(torch.cpu, f"_is_{instructions}_supported", lambda has=has: has)
