"""The rule that computes images as sub-pixel convolutions, and bfloat16; test_strided.py has what they compute."""

import pytest
import torch
from convolutions import BY_SUBPIXEL, beside_float64, on_processor, recorded_operations

from dcgan import models
from dcgan.config import Model
from dcgan.convolution import subpixel


@pytest.fixture
def used(monkeypatch):
    return recorded_operations(monkeypatch, subpixel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "channels"), [(4, 3), (5, 1), (5, 3)])
@pytest.mark.parametrize("processor", ["AVX2", "AVX-512", "AVX-512 BF16", "AMX"])
def test_it_is_used_at_the_pixels_where_bfloat16_is_fast(used, monkeypatch, processor, kernel, channels, dtype):
    on_processor(monkeypatch, processor)
    size = 28 if channels == 1 else 32
    z = "normal" if kernel == 4 else "uniform"
    nets = models.build(Model(kernel=kernel, width=8, z=z), channels, 0, size, seed=0)
    generator, discriminator = (net.to(memory_format=torch.channels_last) for net in nets)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        images = generator(torch.randn(2, generator.z_dim))
        assert images.is_contiguous(memory_format=torch.channels_last)
        logits = discriminator(images)
        with torch.no_grad():
            discriminator(images)
        assert len(used) == (processor not in ("AVX2", "AVX-512"))
    logits.sum().backward()
    assert used == ([] if processor in ("AVX2", "AVX-512") else ["larger", "larger"])


def test_it_is_not_used_in_float64_nor_in_another_format(used, monkeypatch):
    on_processor(monkeypatch, "AMX")
    for net in models.build(Model(kernel=4, width=8), 3, 0, 32, seed=0):
        x = torch.randn(2, 100) if net.convs[-1].weight.shape[1] == 3 else torch.randn(2, 3, 32, 32)
        x.requires_grad_()
        net(x).sum().backward()
        net.double().to(memory_format=torch.channels_last)(x.double()).sum().backward()
    assert not used


@pytest.mark.parametrize("kernel", [3, 4, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_bfloat16_loses_no_more_than_pytorchs(kernel, transposed):
    for ours, theirs, exact in beside_float64(BY_SUBPIXEL, kernel, 8, 32, 3, 8, 8, transposed, torch.bfloat16):
        assert (ours - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()
