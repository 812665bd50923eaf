"""Convolutions of stride 2 in every way: each is PyTorch's, and has its gradients."""

import pytest
import torch
import torch.nn.functional as F
from convolutions import BY_PATCHES, BY_SUBPIXEL, case, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from dcgan.convolution import im2col, patches, winograd
from dcgan.convolution.strided import Operations

WAYS = {
    "winograd": winograd,
    "im2col": im2col,
    "subpixel": BY_SUBPIXEL,
    "patches": BY_PATCHES,
    "PyTorch": Operations(),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@every_way
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
    way, kernel, count, channels, larger, height, width, transposed, channels_last, part
):
    x, weight, theirs, ours = case(way, kernel, count, channels, larger, height, width, transposed)
    if channels_last:
        x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight))
    kept = winograd.PART, patches.PART
    winograd.PART = patches.PART = part
    try:
        got = with_gradients(ours, x, weight)
    finally:
        winograd.PART, patches.PART = kept
    for one, other in zip(got, with_gradients(theirs, x, weight), strict=True):
        torch.testing.assert_close(one, other)


@every_way
@pytest.mark.parametrize("transposed", [False, True])
def test_it_computes_the_gradient_that_is_wanted_alone(way, transposed):
    x, weight, theirs, ours = case(way, 4, 3, 4, 5, 8, 8, transposed)
    expected = with_gradients(theirs, x, weight)
    for wanted in (0, 1):
        parts = [x.clone(), weight.clone()]
        parts[wanted].requires_grad_()
        y = ours(*parts)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape).to(y.dtype))
        torch.testing.assert_close(parts[wanted].grad, expected[1 + wanted])
        assert parts[1 - wanted].grad is None


@every_way
@pytest.mark.parametrize("transposed", [False, True])
def test_what_follows_may_work_in_place_on_it(way, transposed):
    x, weight, *both = case(way, 4, 3, 4, 2, 5, 5, transposed)
    expected, got = (
        with_gradients(lambda x, w, a=apply: F.leaky_relu(a(x, w), 0.2, inplace=True), x, weight) for apply in both
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
