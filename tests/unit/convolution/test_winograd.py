"""What Winograd's filtering loses in float32, and the rule that chooses it; test_strided.py has what it computes."""

import pytest
import torch
from convolutions import beside_float64, on_processor, recorded
from torch import nn

from dcgan import models
from dcgan.config import Model
from dcgan.convolution import modules, winograd
from dcgan.convolution.modules import Conv2d, ConvTranspose2d


@pytest.mark.parametrize("kernel", [3, 4, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_float32_loses_little(kernel, transposed):
    """Of the largest value at most 6e-6, where PyTorch's loses 1.4e-6."""
    for ours, _, exact in beside_float64(winograd, kernel, 8, 128, 64, 8, 8, transposed, torch.float32):
        assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.fixture(autouse=True)
def _processor(monkeypatch):
    on_processor(monkeypatch, "AVX2")


@pytest.fixture
def used(monkeypatch):
    return recorded(monkeypatch, winograd)


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
    return modules._by_winograd(x, module.weight, modules._layer(module, height, width))


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


def test_it_is_not_used_without_a_gradient_nor_in_other_numbers_nor_in_another_format_nor_where_bfloat16_is_fast(
    monkeypatch,
):
    monkeypatch.setattr(modules, "LIMIT", float("inf"))
    conv, x = Conv2d(8, 16, 4, 2, 1, bias=False).to(memory_format=torch.channels_last), torch.randn(4, 8, 8, 8)
    assert chosen(conv, x)
    with torch.no_grad():
        assert not chosen(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not chosen(conv, x)
    assert not chosen(conv, x.double())
    assert not chosen(Conv2d(8, 16, 4, 2, 1, bias=False), x)
    on_processor(monkeypatch, "AVX-512 BF16")
    assert not chosen(conv, x)
    on_processor(monkeypatch, "AVX2")
    conv.weight.requires_grad_(False)
    assert not chosen(conv, x)


def test_the_modules_use_it_where_it_fits(used, monkeypatch):
    monkeypatch.setattr(modules, "LIMIT", float("inf"))
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
