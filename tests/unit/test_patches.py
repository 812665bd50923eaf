"""Convolutions at the pixels against PyTorch's, and the rule that chooses them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dcgan import models
from dcgan.config import Model
from dcgan.convolution import Conv2d, ConvTranspose2d
from dcgan.patches import Convolution, Transposed
from dcgan.winograd import Layer

GEOMETRY = {3: (1, 1), 4: (1, 0), 5: (2, 1)}  # kernel: padding, output padding


def with_gradients(apply, x, weight):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = apply(x, weight)
    torch.manual_seed(1)
    return y, *torch.autograd.grad(y, (x, weight), torch.randn(y.shape).to(y.dtype))


def case(kernel, count, channels, larger, height, width, transposed):
    """x, weight, PyTorch's operation and ours."""
    padding, more = GEOMETRY[kernel]
    layer = Layer(kernel, padding, height, width)
    weight = torch.randn(channels, larger, kernel, kernel, dtype=torch.float64)
    if transposed:
        x = torch.randn(count, channels, height, width, dtype=torch.float64)
        return x, weight, lambda x, w: F.conv_transpose2d(x, w, None, 2, padding, more), _apply(Transposed, layer)
    x = torch.randn(count, larger, 2 * height, 2 * width, dtype=torch.float64)
    return x, weight, lambda x, w: F.conv2d(x, w, None, 2, padding), _apply(Convolution, layer)


def _apply(function, layer):
    return lambda x, w: function.apply(x, w, layer)


@settings(deadline=None, max_examples=100)
@given(
    kernel=st.sampled_from([3, 4, 5]),
    count=st.integers(1, 4),
    channels=st.integers(1, 5),
    larger=st.integers(1, 4),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    transposed=st.booleans(),
    channels_last=st.booleans(),
)
def test_it_is_the_convolution_and_has_its_gradients(
    kernel, count, channels, larger, height, width, transposed, channels_last
):
    x, weight, theirs, ours = case(kernel, count, channels, larger, height, width, transposed)
    if channels_last:
        x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight))
    for one, other in zip(with_gradients(ours, x, weight), with_gradients(theirs, x, weight), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("transposed", [False, True])
def test_it_computes_the_gradient_that_is_wanted_alone(transposed):
    x, weight, theirs, ours = case(4, 3, 4, 2, 5, 5, transposed)
    expected = with_gradients(theirs, x, weight)
    for wanted in (0, 1):
        parts = [x.clone(), weight.clone()]
        parts[wanted].requires_grad_()
        y = ours(*parts)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape).to(y.dtype))
        torch.testing.assert_close(parts[wanted].grad, expected[1 + wanted])
        assert parts[1 - wanted].grad is None


@pytest.mark.parametrize("transposed", [False, True])
def test_what_follows_may_work_in_place_on_it(transposed):
    x, weight, theirs, ours = case(4, 3, 4, 2, 5, 5, transposed)
    got, expected = (
        with_gradients(lambda x, w, a=apply: F.leaky_relu(a(x, w), 0.2, inplace=True), x, weight)
        for apply in (ours, theirs)
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


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


@pytest.mark.parametrize(("kernel", "channels", "expected"), [(4, 3, True), (5, 1, True), (5, 3, False), (3, 3, False)])
def test_it_is_used_at_the_pixels_alone(used, kernel, channels, expected):
    size = 28 if channels == 1 else 32
    z = "normal" if kernel == 4 else "uniform"
    generator, discriminator = models.build(Model(kernel=kernel, width=8, z=z), channels, 0, size, seed=0)
    for net in (generator, discriminator):
        net.to(memory_format=torch.channels_last)
    images = generator(torch.randn(2, generator.z_dim))
    assert used == (["Transposed"] if expected else [])
    discriminator(images)
    assert used == (["Transposed", "Convolution"] if expected else [])


def test_it_is_not_used_in_other_numbers_nor_in_another_format(used):
    for module, x in (
        (Conv2d(1, 8, 4, 2, 1, bias=False), torch.randn(2, 1, 8, 8)),
        (ConvTranspose2d(8, 1, 4, 2, 1, bias=False), torch.randn(2, 8, 4, 4)),
    ):
        module(x)
        module.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            module(x)
        assert not used
        module(x)
        with torch.no_grad():
            module(x)
        assert len(used) == 2
        used.clear()
