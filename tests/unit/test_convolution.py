"""The weight gradient by patches against PyTorch's own, in float64, and the rule that chooses it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from strided import on_processor
from torch import nn

from dcgan import convolution, models
from dcgan.config import Model
from dcgan.convolution import Conv2d, ConvTranspose2d, _Im2colGradient


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
    got = gradients(lambda x, w: _Im2colGradient.apply(x, w, (2, 2), (padding, padding), None), x, weight, 0)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("kernel", "padding", "more"), [(3, 1, 1), (4, 1, 0), (5, 2, 1)])
def test_a_transposed_convolution_has_pytorchs_gradients(kernel, padding, more):
    x, weight = torch.randn(3, 6, 4, 4).double(), torch.randn(6, 5, kernel, kernel).double()
    plain = nn.ConvTranspose2d(6, 5, kernel, 2, padding, more, bias=False).double()
    expected = gradients(lambda x, w: torch.func.functional_call(plain, {"weight": w}, (x,)), x, weight, 0)
    got = gradients(lambda x, w: _Im2colGradient.apply(x, w, (2, 2), (padding, padding), (more, more)), x, weight, 0)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


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

    expected = gradients(by_definition, x, layer.weight.detach(), 0)
    for found, value in zip(gradients(ours, x, layer.weight.detach(), 0), expected, strict=True):
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
    """How often the gradient by patches was computed."""
    calls = []
    product = convolution._product
    monkeypatch.setattr(convolution, "_product", lambda *args: calls.append(1) or product(*args))
    return calls


@pytest.mark.parametrize("layer", [Conv2d(8, 4, 4, 2, 1, bias=False), ConvTranspose2d(4, 8, 4, 2, 1, bias=False)])
def test_it_is_used_for_small_maps_alone_and_gives_the_same(used, layer, monkeypatch):
    on_processor(monkeypatch, "AMX")
    x = torch.randn(5, layer.in_channels, 8, 8).contiguous(memory_format=torch.channels_last)

    def gradient():
        layer.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        return layer.weight.grad

    by_patches = gradient()
    assert len(used) == 1
    monkeypatch.setattr(convolution, "PATCHES_AMX", (1, 100))
    plain = gradient()
    assert len(used) == 1
    torch.testing.assert_close(by_patches, plain, rtol=0.02, atol=0.02 * plain.abs().max().item())


@pytest.mark.parametrize("kind", [Conv2d, ConvTranspose2d])
@pytest.mark.parametrize(
    ("processor", "smaller", "larger", "expected"),
    [
        ("AMX", 128, 64, True),
        ("AMX", 256, 3, False),
        ("AVX-512 BF16", 128, 64, False),
        ("AVX-512 BF16", 256, 64, True),
        ("AVX-512 BF16", 256, 3, False),
        ("AVX-512", 256, 64, False),
    ],
)
def test_the_processor_and_the_channels_decide(used, monkeypatch, kind, processor, smaller, larger, expected):
    on_processor(monkeypatch, processor)
    channels = (larger, smaller) if kind is Conv2d else (smaller, larger)
    layer = kind(*channels, 4, 2, 1, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, channels[0], 4, 4)).sum().backward()
    assert bool(used) == expected


def test_it_is_not_used_in_float32_nor_without_a_gradient(used, monkeypatch):
    layer, x = Conv2d(8, 4, 4, 2, 1, bias=False), torch.randn(5, 8, 8, 8)
    on_processor(monkeypatch, "AMX")
    layer(x).sum().backward()
    layer.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.requires_grad_()).sum().backward()
    assert not used


def test_modules_have_the_parameters_of_pytorchs():
    for ours, theirs in ((Conv2d, nn.Conv2d), (ConvTranspose2d, nn.ConvTranspose2d)):
        assert isinstance(ours(2, 3, 4), theirs)
        assert ours(2, 3, 4, bias=False).state_dict().keys() == {"weight"}
