"""Cropping, resizing and the split by content hash."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from dcgan.data.sources.base import held_out, require_both, square


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.sampled_from([28, 32, 64]),
    mode=st.sampled_from(["L", "RGB"]),
)
def test_square_is_torchvisions_crop_and_resize(width: int, height: int, size: int, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    reference = v2.Compose([v2.CenterCrop(min(width, height)), v2.Resize((size, size)), v2.PILToTensor()])
    np.testing.assert_array_equal(square(image, size), reference(image).numpy())


@pytest.mark.parametrize("side", [8, 32, 100, 257])
def test_resizing_is_antialiased(side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    reference = F.interpolate(tensor, (32, 32), mode="bilinear", antialias=True)[0].numpy()
    assert np.abs(square(Image.fromarray(pixels), 32) - reference).max() <= 1, "Pillow rounds after each of two passes"


def test_the_split_has_the_share_and_follows_the_content() -> None:
    hashes = [hashlib.sha256(str(i).encode()).digest() for i in range(20_000)]
    for fraction in (0.01, 0.1, 0.5):
        share = np.mean([held_out(value, fraction) for value in hashes])
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / len(hashes)) ** 0.5  # four standard deviations
    larger = [held_out(value, 0.5) for value in hashes]
    assert all(there for here, there in zip((held_out(v, 0.1) for v in hashes), larger, strict=True) if here), "nested"


@pytest.mark.parametrize(("train", "test", "side"), [(0, 2, "train"), (2, 0, "test"), (0, 0, "train")])
def test_an_empty_side_is_refused(train: int, test: int, side: str) -> None:
    with pytest.raises(
        ValueError, match=rf"toy: {train + test} images with data.test_fraction=0.1 leave split '{side}'"
    ):
        require_both("toy", train, test, 0.1)
