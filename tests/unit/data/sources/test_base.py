"""The split by content hash."""

import hashlib

import numpy as np
import pytest

from dcgan.data.sources.base import held_out, require_both


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
