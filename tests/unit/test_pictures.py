"""PNGs that an independent decoder reads back exactly."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dcgan import pictures


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), channels=st.sampled_from([1, 3]), seed=st.integers(0, 9))
def test_pillow_reads_back_every_pixel(tmp_path_factory, height, width, channels, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    picture = picture[:, :, 0] if channels == 1 else picture
    file = tmp_path_factory.mktemp("png") / "a.png"
    pictures.write_png(file, picture)
    assert np.array_equal(np.asarray(Image.open(file)), picture)
    assert [p.name for p in file.parent.iterdir()] == ["a.png"]


def test_grid_puts_images_row_by_row():
    images = np.stack([np.full((3, 2, 2), value, np.uint8) for value in (10, 20, 30)])
    picture = pictures.grid(images, columns=2)
    assert picture.shape == (2 * 4 + 2, 2 * 4 + 2, 3)
    assert [picture[2, 2, 0], picture[2, 6, 0], picture[6, 2, 0], picture[6, 6, 0]] == [10, 20, 30, 255]
    assert pictures.grid(images[:, :1], 3).ndim == 2


def test_values_are_scaled_rounded_and_clipped():
    values = np.array([-2.0, -1.0, 0.0, 1.0, 1.5])
    assert pictures.to_uint8(values).tolist() == [0, 0, 128, 255, 255]
    every = np.arange(256)
    assert np.array_equal(pictures.to_uint8(every / 127.5 - 1), every)


def test_a_missing_directory_is_made(tmp_path):
    pictures.write_png(tmp_path / "new" / "a.png", np.zeros((2, 2), np.uint8))
    assert Image.open(tmp_path / "new" / "a.png").size == (2, 2)
