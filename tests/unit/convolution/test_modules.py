"""What a label adds to a layer, and the rule that computes layers by patches; test_strided.py has what they compute."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from convolutions import BY_PATCHES, beside_float64, on_processor, recorded_operations, with_gradients
from torch import nn

from dcgan import models
from dcgan.config import Model
from dcgan.convolution import modules, patches
from dcgan.convolution.modules import Conv2d, ConvTranspose2d


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kernel", "padding", "more"), [(3, 1, 1), (4, 1, 0), (5, 2, 1)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", [Conv2d, ConvTranspose2d])
def test_a_label_is_a_constant_map_of_each_class(kind, stride, kernel, padding, more, channels_last):
    """Output and gradients are those of PyTorch's layer over the channels with the label's maps after them."""
    geometry = {"stride": stride, "padding": padding, "bias": False}
    if kind is ConvTranspose2d:
        geometry["output_padding"] = more if stride == 2 else 0
    format = torch.channels_last if channels_last else torch.contiguous_format
    layer = kind(3 + 4, 6, kernel, **geometry).double().to(memory_format=format)
    plain = (nn.Conv2d if kind is Conv2d else nn.ConvTranspose2d)(3 + 4, 6, kernel, **geometry).double()
    x = torch.randn(5, 3, 8, 6).double().contiguous(memory_format=format)
    onehot = F.one_hot(torch.tensor([3, 0, 0, 2, 3]), 4).float()
    maps = onehot.double()[:, :, None, None].expand(-1, -1, 8, 6)

    def by_definition(x, weight):
        return torch.func.functional_call(plain, {"weight": weight}, (torch.cat([x, maps], 1),))

    def ours(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x, onehot))

    expected = with_gradients(by_definition, x, layer.weight.detach())
    for found, value in zip(with_gradients(ours, x, layer.weight.detach()), expected, strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("processor", ["AVX2", "AVX-512 BF16"])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_the_nets_of_mnist_have_the_gradients_of_constant_maps(format, processor, monkeypatch):
    """In float32, by whatever way each layer is computed, with a label that some images lack and one that all lack."""
    on_processor(monkeypatch, processor)

    def play(by_definition):
        nets = models.build(Model(kernel=5, width=32, conditional=True, hidden=16, affine=False), 1, 10, 28, seed=0)
        generator, discriminator = (net.to(memory_format=format) for net in nets)
        if by_definition:
            for layer in (*generator.convs, *discriminator.convs):
                layer.forward = partial(joined, layer)
        labels = torch.arange(16) % 9
        logits = discriminator(generator(torch.linspace(-1, 1, 1600).sin().view(16, 100), labels), labels)
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad for net in nets for p in net.parameters())]

    def joined(layer, x, onehot):
        return layer._library(torch.cat([x, onehot[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1), layer.weight)

    for found, value in zip(play(False), play(True), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4 * value.abs().max().item())


@pytest.fixture
def used(monkeypatch):
    """Which operations were computed by patches."""
    return recorded_operations(monkeypatch, patches)


ALL = {"smaller", "larger", "weight_gradient"}
PROCESSOR_CHANNELS_AND_SIZE = [
    ("AMX", 256, 64, 16, ALL),
    ("AMX", 255, 64, 16, {"weight_gradient"}),
    ("AMX", 255, 64, 18, set()),
    ("AMX", 256, 64, 18, set()),
    ("AMX", 256, 4, 16, ALL),
    ("AMX", 256, 3, 16, set()),
    ("AVX-512 BF16", 255, 64, 16, set()),
    ("AVX-512 BF16", 256, 64, 16, {"weight_gradient"}),
    ("AVX-512 BF16", 256, 64, 18, {"weight_gradient"}),
    ("AVX-512 BF16", 256, 3, 16, set()),
    ("AVX-512", 256, 64, 16, set()),
    ("AVX2", 256, 64, 16, set()),
]


@pytest.mark.parametrize("kind", [Conv2d, ConvTranspose2d])
@pytest.mark.parametrize(("processor", "smaller", "larger", "size", "expected"), PROCESSOR_CHANNELS_AND_SIZE)
def test_the_processor_the_channels_and_the_map_decide(
    used, monkeypatch, kind, processor, smaller, larger, size, expected
):
    """The map's width, `size`; it is 16 high."""
    on_processor(monkeypatch, processor)
    channels, stride = ((larger, smaller), 1) if kind is Conv2d else ((smaller, larger), 2)
    layer = kind(*channels, 4, 2, 1, bias=False).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, channels[0], 16 // stride, size // stride, requires_grad=True)).sum().backward()
    assert set(used) == expected


def test_with_avx512_they_are_used_as_far_as_they_were_measured(used, monkeypatch):
    on_processor(monkeypatch, "AVX-512 BF16")
    layer, x = Conv2d(8, 256, 4, 2, 1, bias=False).to(memory_format=torch.channels_last), torch.randn(5, 8, 8, 8)
    for most in (5 * 16 * 8 * 16 * 2 - 1, 5 * 16 * 8 * 16 * 2):
        monkeypatch.setattr(modules, "PATCHES", most)
        assert not used
        with torch.autocast("cpu", torch.bfloat16):
            layer(x).sum().backward()
    assert used == ["weight_gradient"]


def test_they_are_not_used_in_float32_nor_in_another_format_nor_without_a_gradient(used, monkeypatch):
    on_processor(monkeypatch, "AMX")
    layer, x = Conv2d(8, 4, 4, 2, 1, bias=False), torch.randn(5, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    layer.to(memory_format=torch.channels_last)
    layer(x).sum().backward()
    layer.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.requires_grad_()).sum().backward()
    assert not used


@pytest.mark.parametrize("kernel", [3, 4, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_bfloat16_loses_no_more_than_pytorchs(kernel, transposed):
    found = beside_float64(BY_PATCHES, kernel, 8, 32, 16, 8, 8, transposed, torch.bfloat16)
    for ours, theirs, exact in found:
        assert (ours - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("kernel", [3, 4, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_sum_over_parts_loses_what_rounding_each_part_costs(monkeypatch, kernel, transposed):
    """1.6 times what PyTorch loses; summed in bfloat16, they would lose 6 times as much."""
    monkeypatch.setattr(patches, "PART", 1)
    *_, (ours, theirs, exact) = beside_float64(BY_PATCHES, kernel, 64, 32, 16, 8, 8, transposed, torch.bfloat16)
    assert (ours - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("module", [Conv2d(4, 256, 3, 2, 0, bias=False), ConvTranspose2d(256, 4, 4, 2, 0, bias=False)])
def test_maps_that_are_not_halved_or_doubled_are_left_to_pytorch(used, monkeypatch, module):
    on_processor(monkeypatch, "AMX")
    module.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(2, module.in_channels, 8, 8, requires_grad=True)).sum().backward()
    assert not used


def test_modules_have_the_parameters_of_pytorchs():
    for ours, theirs in ((Conv2d, nn.Conv2d), (ConvTranspose2d, nn.ConvTranspose2d)):
        assert isinstance(ours(2, 3, 4), theirs)
        assert ours(2, 3, 4, bias=False).state_dict().keys() == {"weight"}
