"""The digits are scikit-learn's, all of them, with their labels."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from dcgan.config import Data, build
from dcgan.data.ingest import ingest
from dcgan.data.sources import digits
from dcgan.data.store import Store


def test_every_digit_is_on_its_side_with_its_label(digits_store: Store) -> None:
    bunch = load_digits()
    scaled = torch.from_numpy(bunch.images * 255 / 16).round()
    expected = F.interpolate(scaled[:, None], (32, 32), mode="bilinear", align_corners=False, antialias=True)
    first_eight = [hashlib.sha256(image.to(torch.uint8).numpy().tobytes()).hexdigest()[:16] for image in scaled]
    side = np.array([int(value, 16) / 2**64 < 0.2 for value in first_eight])
    for split, chosen in (("train", ~side), ("test", side)):
        np.testing.assert_array_equal(digits_store.labels(split), bunch.target[chosen])
        assert np.abs(digits_store.images(split) - expected[chosen].numpy()).max() <= 1
    assert digits_store.count("train") + digits_store.count("test") == 1797
    assert digits_store.classes == tuple("0123456789")
    assert digits_store.images("train").min() == 0
    assert digits_store.images("train").max() == 255


def test_a_fraction_that_leaves_a_side_empty_is_refused(tmp_path: Path) -> None:
    data = Data(name="digits", size=28, test_fraction=1e-9)
    with pytest.raises(
        ValueError, match=r"digits: 1797 images with data\.test_fraction=1e-09 leave split 'test' empty"
    ):
        digits.read(data, tmp_path)


def test_nothing_is_downloaded(tmp_path: Path) -> None:
    ingest(build("digits", ["data.size=28"]).data, tmp_path)
    assert not (tmp_path / "downloads").exists()
