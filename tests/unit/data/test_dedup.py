"""Near-duplicates are found wherever they stand, and different images are kept apart."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcgan.data import dedup
from dcgan.data.dedup import Images


def blobs(count: int, size: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth random images, uint8 (count, channels, size, size): like photographs, most of their power is coarse."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) * size
    spectrum = np.fft.rfft2(generator.standard_normal((count, channels, size, size))) / (1 + frequency**2)
    waves = np.fft.irfft2(spectrum, (size, size))
    waves -= waves.mean((1, 2, 3), keepdims=True)
    return np.clip(128 + 50 * waves / waves.std((1, 2, 3), keepdims=True), 0, 255).astype(np.uint8)


def shifted(images: np.ndarray) -> np.ndarray:
    return np.concatenate([images[..., 1:], images[..., -1:]], -1)


def brighter(images: np.ndarray) -> np.ndarray:
    return np.clip(images * 1.03, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def originals() -> np.ndarray:
    return blobs(400, 64)


def test_planted_duplicates_are_found_and_nothing_else(originals: np.ndarray) -> None:
    copies = [originals[:50], shifted(originals[50:100]), brighter(originals[100:150])]
    found = dedup.find([originals, np.concatenate(copies)])
    wanted = [[row, 400 + row] for row in range(150)]
    assert [group for group in wanted[:50] if group not in found] == [], "equal pixels are always found"
    assert len([group for group in wanted if group in found]) >= 145
    assert [group for group in found if group not in wanted] == []


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (28, 1), (96, 3)])
def test_other_sizes_and_grey(size: int, channels: int) -> None:
    images = blobs(60, size, channels)
    assert dedup.find([images, images[[7, 3]], shifted(images[:1])]) == [[0, 62], [3, 61], [7, 60]]


def test_groups_do_not_depend_on_where_shards_end_and_repeat(originals: np.ndarray) -> None:
    images = np.concatenate([originals, shifted(originals[:60]), originals[40:80]])
    torch.manual_seed(1)
    whole = dedup.find([images], seed=3)
    torch.manual_seed(2)
    assert dedup.find(np.split(images, [1, 2, 300, 300, 457]), seed=3) == whole
    assert all(first[0] < second[0] for first, second in pairwise(whole))
    assert all(group == sorted(set(group)) and len(group) > 1 for group in whole)
    assert [40, 440, 460] in whole


def test_training_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    dedup.find([blobs(10)])
    assert torch.equal(torch.rand(3), wanted)


def test_the_seed_is_used() -> None:
    images = Images([blobs(300)])
    codes = [dedup.encode(images, dedup.train(images, seed)) for seed in (0, 0, 1)]
    assert np.array_equal(codes[0], codes[1])
    assert not np.array_equal(codes[0], codes[2])


def test_the_sample_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "SAMPLE", 16)
    read: list[np.ndarray] = []

    class Watched(Images):
        def __getitem__(self, rows: np.ndarray) -> np.ndarray:
            read.append(rows)
            return super().__getitem__(rows)

    dedup.train(Watched([blobs(200)]), 0)
    rows = np.concatenate(read)
    assert len(rows) == len(set(rows.tolist())) == 16
    assert rows.max() > 100, "drawn from all images, not the first"


def test_every_unit_is_on_for_about_half_of_the_images(originals: np.ndarray) -> None:
    images = Images([originals])
    bits = np.unpackbits(dedup.encode(images, dedup.train(images, 0)).view(np.uint8), axis=1)
    assert bits.shape == (400, dedup.CODE)
    assert bits.mean(0).min() > 0.25
    assert bits.mean(0).max() < 0.75


def test_a_pair_that_was_refused_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty different images of one code: every sort brings them together."""
    images, compare, seen = Images([blobs(40, 8)]), dedup.same, []

    def watched(images: Images, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        seen.extend(zip(one.tolist(), other.tolist(), strict=True))
        return compare(images, one, other)

    monkeypatch.setattr(dedup, "same", watched)
    codes = np.random.default_rng(0).integers(0, 2, (40, 2)).astype(np.uint64)  # up to two bits apart
    assert dedup._link(images, codes, 0).tolist() == list(range(40))
    assert len(seen) == len(set(seen)) > 40 * dedup.WINDOW / 2
    assert all(one < other for one, other in seen)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_to_compare(count: int) -> None:
    assert dedup.find([blobs(1)[:count]]) == []


def test_one_image_many_times_is_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "BLOCK", 64)
    count = 10 * dedup.WINDOW + 1
    assert dedup.find([np.repeat(blobs(1, 8), count, 0)]) == [list(range(count))]


def test_constant_images_are_duplicates_only_of_their_colour() -> None:
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255], [90, 90, 90]], np.uint8)
    flat = np.broadcast_to(colours[:, :, None, None], (5, 3, 32, 32))
    assert dedup.find([flat, blobs(3), flat[[4, 2]]]) == [[2, 9], [4, 8]]


def test_a_chain_is_cut_where_its_ends_no_longer_agree() -> None:
    """Each step of a pixel is a near-duplicate of the step before, three pixels are not."""
    chain = [blobs(1, seed=5)]
    for _ in range(3):
        chain.append(shifted(chain[-1]))
    images = Images([np.concatenate(chain)])
    assert dedup.same(images, np.array([0, 1, 2]), np.array([1, 2, 3])).all()
    assert not dedup.same(images, np.array([0]), np.array([3])).any()
    group, *others = dedup._stars(images, np.zeros(4, np.int64))
    assert group[:2] == [0, 1]
    assert 3 not in group
    assert all(dedup.same(images, np.full(len(g), g[0]), np.array(g)).all() for g in others)


def test_a_corner_that_differs_in_light_or_edges_is_refused() -> None:
    image = blobs(1)
    darker = (image * 0.6).astype(np.uint8)
    images = Images([image, darker, image[:, :, ::-1], shifted(image), shifted(shifted(shifted(image)))])
    assert dedup.same(images, np.zeros(5, np.int64), np.arange(5)).tolist() == [True, False, False, True, False]


@settings(max_examples=40)
@given(st.integers(2, 60), st.integers(0, 2**32 - 1), st.integers(0, 14))
def test_close_codes_are_close_and_equal_ones_neighbours(count: int, seed: int, flips: int) -> None:
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 2**64, (count, 2), np.uint64)
    codes = np.concatenate([codes, codes])
    for bit in generator.permutation(dedup.CODE)[:flips]:
        codes[-1, bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    pairs = {tuple(sorted(p)) for a, b in dedup._close(codes, seed) for p in zip(a.tolist(), b.tolist(), strict=True)}
    assert all(int(np.bitwise_count(codes[a] ^ codes[b]).sum()) <= dedup.FLIPPED and a < b for a, b in pairs)
    assert {(row, count + row) for row in range(count)} <= pairs


def test_a_code_further_off_than_the_limit_is_not_close() -> None:
    codes = np.zeros((2, 2), np.uint64)
    for bits, close in ((dedup.FLIPPED, True), (dedup.FLIPPED + 1, False)):
        codes[1, 0] = (1 << bits) - 1
        assert any(len(a) for a, _ in dedup._close(codes, 0)) == close


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40))
def test_joined_rows_point_to_the_first_of_all_they_hang_together_with(pairs: list[tuple[int, int]]) -> None:
    first = np.arange(20)
    for pair in pairs:
        dedup._join(first, *np.array([pair]).T)
    wanted = list(range(20))
    for _ in wanted:
        for a, b in pairs:
            wanted[a] = wanted[b] = min(wanted[a], wanted[b])
    assert first.tolist() == wanted


@pytest.mark.parametrize(
    "shards",
    [
        [],
        [np.zeros((2, 3, 8, 8), np.float32)],
        [np.zeros((2, 3, 8, 9), np.uint8)],
        [np.zeros((2, 2, 8, 8), np.uint8)],
        [np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 3, 9, 9), np.uint8)],
    ],
)
def test_what_is_no_collection_of_images_is_refused(shards: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"^shards of .*; expected uint8 \(n, 1 or 3, H, H\)"):
        dedup.find(shards)
