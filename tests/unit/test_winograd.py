"""Winograd's filtering against PyTorch's convolutions, and the rule that chooses it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dcgan import convolution, models, winograd
from dcgan.config import Model
from dcgan.convolution import Conv2d, ConvTranspose2d
from dcgan.winograd import Convolution, Layer, Transposed

GEOMETRY = {3: (1, 1), 4: (1, 0), 5: (2, 1)}  # kernel: padding, output padding


def with_gradients(apply, x, weight):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = apply(x, weight)
    torch.manual_seed(1)
    return y, *torch.autograd.grad(y, (x, weight), torch.randn(y.shape).to(y.dtype))


def case(kernel, count, channels, larger, height, width, transposed, dtype=torch.float64):
    """x, weight, PyTorch's operation and ours."""
    padding, more = GEOMETRY[kernel]
    layer = Layer(kernel, padding, height, width)
    weight = torch.randn(channels, larger, kernel, kernel, dtype=dtype)
    if transposed:
        x = torch.randn(count, channels, height, width, dtype=dtype)
        return x, weight, lambda x, w: F.conv_transpose2d(x, w, None, 2, padding, more), _apply(Transposed, layer)
    x = torch.randn(count, larger, 2 * height, 2 * width, dtype=dtype)
    return x, weight, lambda x, w: F.conv2d(x, w, None, 2, padding), _apply(Convolution, layer)


def _apply(function, layer):
    return lambda x, w: function.apply(x, w, layer)


@settings(deadline=None, max_examples=100)
@given(
    kernel=st.sampled_from([3, 4, 5]),
    count=st.integers(1, 5),
    channels=st.integers(1, 5),
    larger=st.integers(1, 5),
    height=st.integers(1, 10),
    width=st.integers(1, 10),
    transposed=st.booleans(),
    channels_last=st.booleans(),
    part=st.sampled_from([1, 20_000, 2**25]),
)
def test_it_is_the_convolution_and_has_its_gradients(
    kernel, count, channels, larger, height, width, transposed, channels_last, part
):
    x, weight, theirs, ours = case(kernel, count, channels, larger, height, width, transposed)
    if channels_last:
        x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight))
    kept, winograd.PART = winograd.PART, part
    try:
        got = with_gradients(ours, x, weight)
    finally:
        winograd.PART = kept
    for one, other in zip(got, with_gradients(theirs, x, weight), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("transposed", [False, True])
def test_it_computes_the_gradient_that_is_wanted_alone(transposed):
    x, weight, theirs, ours = case(4, 3, 4, 5, 8, 8, transposed)
    expected = with_gradients(theirs, x, weight)
    for wanted in (0, 1):
        parts = [x.clone(), weight.clone()]
        parts[wanted].requires_grad_()
        y = ours(*parts)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape).to(y.dtype))
        torch.testing.assert_close(parts[wanted].grad, expected[1 + wanted])
        assert parts[1 - wanted].grad is None


@pytest.mark.parametrize("kernel", [3, 4, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_float32_loses_little(kernel, transposed):
    """Of the largest value at most 6e-6, where PyTorch's loses 1.4e-6."""
    torch.manual_seed(0)
    x, weight, theirs, ours = case(kernel, 8, 128, 64, 8, 8, transposed, torch.float32)
    exact = with_gradients(theirs, x.double(), weight.double())
    for one, other in zip(with_gradients(ours, x, weight), exact, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.fixture
def used(monkeypatch):
    """Names of the functions that were used."""
    calls = []
    for function in (Convolution, Transposed):
        apply = function.apply
        monkeypatch.setattr(
            function, "apply", lambda *args, a=apply, name=function.__name__: calls.append(name) or a(*args)
        )
    return calls


def layers(size, width=64):
    """The nets of PyTorch's tutorial and a step's calls, for a batch of 128: (module, x)."""
    generator, discriminator = models.build(Model(kernel=4, width=width, z="normal"), 3, 0, size, seed=0)
    for net in (generator, discriminator):
        net.to(memory_format=torch.channels_last)
    side = size
    for conv in discriminator.convs:
        yield conv, torch.empty(128, conv.in_channels, side, side)
        side //= 2
    for conv in generator.convs:
        yield conv, torch.empty(128, conv.in_channels, side, side)
        side *= 2


def chosen(module, x):
    height, width = (s // 2 for s in x.shape[2:]) if isinstance(module, nn.Conv2d) else x.shape[2:]
    return convolution._by_winograd(x, module.weight, convolution._layer(module, height, width))


@pytest.mark.parametrize("size", [32, 64])
def test_wide_layers_use_it_and_those_at_the_pixels_not(size):
    for module, x in layers(size):
        assert chosen(module, x) == (3 not in module.weight.shape)
    assert not any(chosen(module, x) for module, x in layers(size, width=16) if module.weight.shape[0] <= 64)


def test_a_layer_between_wide_maps_uses_it_for_the_gradient_of_its_input_alone_too():
    modules = [(module, x.requires_grad_()) for module, x in layers(32) if isinstance(module, nn.Conv2d)]
    for module, _ in modules:
        module.weight.requires_grad_(False)
    assert [chosen(module, x) for module, x in modules] == [False, True, True]


def test_it_is_not_used_without_a_gradient_nor_in_other_numbers_nor_in_another_format(monkeypatch):
    monkeypatch.setattr(convolution, "LIMIT", float("inf"))
    conv, x = Conv2d(8, 16, 4, 2, 1, bias=False).to(memory_format=torch.channels_last), torch.randn(4, 8, 8, 8)
    assert chosen(conv, x)
    with torch.no_grad():
        assert not chosen(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not chosen(conv, x)
    assert not chosen(conv, x.double())
    assert not chosen(Conv2d(8, 16, 4, 2, 1, bias=False), x)
    conv.weight.requires_grad_(False)
    assert not chosen(conv, x)


def test_the_modules_use_it_where_it_fits(used, monkeypatch):
    monkeypatch.setattr(convolution, "LIMIT", float("inf"))
    x = torch.randn(2, 8, 8, 8)

    def play(module, x):
        used.clear()
        module.to(memory_format=torch.channels_last)(x).sum().backward()
        return used

    assert play(Conv2d(8, 16, 4, 2, 1, bias=False), x) == ["Convolution"]
    assert play(ConvTranspose2d(8, 16, 5, 2, 2, 1, bias=False), x) == ["Transposed"]
    assert play(Conv2d(8, 16, 4, 2, 1, bias=False), x[:, :, :7]) == []
    assert play(Conv2d(8, 16, 3, 1, 1, bias=False), x) == []
    assert play(ConvTranspose2d(8, 16, 3, 1, 1, bias=False), x) == []
