"""The weight gradient by patches against PyTorch's own, in float64, and the rule that chooses it."""

import pytest
import torch
from torch import nn

from dcgan import convolution
from dcgan.convolution import Conv2d, ConvTranspose2d, _Strided


def gradients(apply, x, weight, seed):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = apply(x, weight)
    torch.manual_seed(seed)
    y.backward(torch.randn_like(y))
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (4, 1), (5, 2)])
@pytest.mark.parametrize("size", [7, 8])
def test_a_convolution_has_pytorchs_gradients(kernel, padding, size, channels_last):
    x, weight = torch.randn(3, 4, size, size).double(), torch.randn(6, 4, kernel, kernel).double()
    if channels_last:
        x, weight = (part.contiguous(memory_format=torch.channels_last) for part in (x, weight))
    plain = nn.Conv2d(4, 6, kernel, 2, padding, bias=False).double()
    expected = gradients(lambda x, w: torch.func.functional_call(plain, {"weight": w}, (x,)), x, weight, 0)
    got = gradients(lambda x, w: _Strided.apply(x, w, (2, 2), (padding, padding), None), x, weight, 0)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("kernel", "padding", "more"), [(3, 1, 1), (4, 1, 0), (5, 2, 1)])
def test_a_transposed_convolution_has_pytorchs_gradients(kernel, padding, more):
    x, weight = torch.randn(3, 6, 4, 4).double(), torch.randn(6, 5, kernel, kernel).double()
    plain = nn.ConvTranspose2d(6, 5, kernel, 2, padding, more, bias=False).double()
    expected = gradients(lambda x, w: torch.func.functional_call(plain, {"weight": w}, (x,)), x, weight, 0)
    got = gradients(lambda x, w: _Strided.apply(x, w, (2, 2), (padding, padding), (more, more)), x, weight, 0)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture
def used(monkeypatch):
    """How often the gradient by patches was computed."""
    calls = []
    product = convolution._product
    monkeypatch.setattr(convolution, "_product", lambda *args: calls.append(1) or product(*args))
    return calls


@pytest.mark.parametrize("layer", [Conv2d(8, 4, 4, 2, 1, bias=False), ConvTranspose2d(4, 8, 4, 2, 1, bias=False)])
def test_it_is_used_for_small_maps_alone_and_gives_the_same(used, layer, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    x = torch.randn(5, layer.in_channels, 8, 8).contiguous(memory_format=torch.channels_last)

    def gradient():
        layer.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        return layer.weight.grad

    by_patches = gradient()
    assert len(used) == 1
    monkeypatch.setattr(convolution, "LARGEST", 100)
    plain = gradient()
    assert len(used) == 1
    torch.testing.assert_close(by_patches, plain, rtol=0.02, atol=0.02 * plain.abs().max().item())


def test_it_is_not_used_without_amx_nor_in_float32_nor_without_a_gradient(used, monkeypatch):
    layer, x = Conv2d(8, 4, 4, 2, 1, bias=False), torch.randn(5, 8, 8, 8)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    layer(x).sum().backward()
    layer.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.requires_grad_()).sum().backward()
    assert not used


def test_modules_have_the_parameters_of_pytorchs():
    for ours, theirs in ((Conv2d, nn.Conv2d), (ConvTranspose2d, nn.ConvTranspose2d)):
        assert isinstance(ours(2, 3, 4), theirs)
        assert ours(2, 3, 4, bias=False).state_dict().keys() == {"weight"}
