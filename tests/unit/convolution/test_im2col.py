"""The rule that computes layers at the pixels by patches; test_strided.py has what they compute."""

import pytest
import torch
from convolutions import on_processor, recorded

from dcgan import models
from dcgan.config import Model
from dcgan.convolution import im2col
from dcgan.convolution.modules import Conv2d, ConvTranspose2d


@pytest.fixture
def used(monkeypatch):
    on_processor(monkeypatch, "AVX2")
    return recorded(monkeypatch, im2col)


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


def test_it_is_not_used_in_other_numbers_nor_in_another_format_nor_where_bfloat16_is_fast(used, monkeypatch):
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
        on_processor(monkeypatch, "AVX-512 BF16")
        module(x)
        assert not used
        on_processor(monkeypatch, "AVX2")
