"""1-nearest-neighbour error of generated images against scikit-learn's, however they are cut into chunks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torchvision.datasets import MNIST

from dcgan.evaluate import generated
from dcgan.evaluate.generated import score

ERROR = "generated_1nn/error"


def images(count, spread=60.0, seed=0, shape=(1, 6, 6)):
    """Three overlapping classes: a picture each, with noise of `spread` levels."""
    pictures = np.random.default_rng(99).uniform(0, 255, (3, *shape))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(count) % 3
    noisy = pictures[labels] + spread * rng.standard_normal((count, *shape))
    return noisy.clip(0, 255).astype(np.uint8), labels


def reference(x, y, real_x, real_y):
    """The same by brute force in float64."""
    classifier = KNeighborsClassifier(1, algorithm="brute").fit(x.reshape(len(x), -1).astype(float), y)
    return 1 - classifier.score(real_x.reshape(len(real_x), -1).astype(float), real_y)


def chunks(x, y, *cuts):
    return zip(np.split(x, cuts), np.split(y, cuts), strict=True)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(generated, "BLOCK", 7)
    monkeypatch.setattr(generated, "QUERIES", 16)


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 5, 4)])
def test_the_error_equals_scikit_learns_at_every_size(small_blocks, shape):
    x, y = images(200, 120, shape=shape)
    real = images(90, 120, seed=1, shape=shape)
    found = score(chunks(x, y, 30, 64, 65), *real, sizes=[20, 64, 100, 200])
    expected = {f"{ERROR}_{n}": pytest.approx(reference(x[:n], y[:n], *real)) for n in (20, 64, 100, 200)}
    assert found == {ERROR: expected[f"{ERROR}_200"], **expected}
    assert 0.05 < found[ERROR] < found[f"{ERROR}_20"] < 0.6


@pytest.mark.parametrize("level", [0, 128, 255])
def test_bright_and_dark_images_are_compared_exactly(level):
    """28 px as MNIST's, a level apart: sums of 784 squares of 255 would not fit float32's 24 bits."""
    x = np.full((40, 1, 28, 28), level, np.uint8)
    inward = 1 if level < 255 else -1
    for index in range(40):
        x[index].reshape(-1)[:index] += np.uint8(inward % 256)  # image k differs from the first in k levels
    order = np.random.default_rng(0).permutation(40)
    assert score([(x[order], order)], x, np.arange(40)) == {ERROR: 0}


@settings(max_examples=50)
@given(st.lists(st.integers(1, 59), max_size=5, unique=True), st.integers(1, 60))
def test_chunks_and_sizes_change_nothing(cuts, size):
    x, y = images(60, 150)
    real = images(30, 150, seed=1)
    whole = score([(x, y)], *real)
    found = score(chunks(x, y, *sorted(cuts)), *real, sizes=[size])
    assert found[ERROR] == whole[ERROR]
    assert found[f"{ERROR}_{size}"] == pytest.approx(reference(x[:size], y[:size], *real))


@pytest.mark.parametrize("cuts", [(), (1,), (8,), (9,), (3, 30)])
def test_of_equally_near_images_the_first_counts(small_blocks, cuts):
    """Across blocks and chunks, on whichever side of the real image they are."""
    x = np.full((40, 1, 2, 2), 250, np.uint8)
    y = np.zeros(40, np.int64)
    x[8], x[30], y[8], y[30] = 100, 104, 1, 2
    real = np.full((1, 1, 2, 2), 102, np.uint8)
    assert score(chunks(x, y, *cuts), real, np.array([1])) == {ERROR: 0}
    assert score(chunks(x[::-1], y[::-1].copy(), *cuts), real, np.array([2])) == {ERROR: 0}
    x[:] = 7
    assert score(chunks(x, np.arange(40) > 0, *cuts), real, np.array([0])) == {ERROR: 0}


@settings(max_examples=100)
@given(st.data(), st.sampled_from([1, 3, 40]), st.sampled_from([0, 1]))
def test_pairs_that_are_too_far_apart_are_left_out_without_changing_anything(data, directions, few):
    """Whether all pairs are compared or only the near ones, the label is that of the first nearest by whole numbers."""
    levels = st.sampled_from([0, 1, 100, 254, 255])
    count, asked = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
    values = data.draw(st.lists(levels, min_size=(count + asked) * 6, max_size=(count + asked) * 6))
    x, real = np.split(np.array(values, np.uint8).reshape(-1, 1, 2, 3), [count])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("DIRECTIONS", directions), ("FEW", few), ("QUERIES", 5)):
            patch.setattr(generated, name, value)
        found = generated._Nearest(real)
        for cut in np.array_split(np.arange(count), min(count, 6)):
            found.add(x[cut], cut)
    apart = ((x.reshape(1, count, -1).astype(int) - real.reshape(asked, 1, -1)) ** 2).sum(2)
    np.testing.assert_array_equal(found.labels.cpu(), apart.argmin(1))


def test_an_image_nearer_by_one_level_is_found(monkeypatch):
    """Among real images whose squared lengths are millions, where float32 has no fractions of a level."""
    monkeypatch.setattr(generated, "FEW", 1)
    real = np.random.default_rng(0).integers(0, 256, (50, 1, 28, 28)).astype(np.uint8)
    found = generated._Nearest(real)
    for count in reversed(range(300)):  # levels that differ from those of the first real image
        nearer = real[:1].copy()
        nearer.reshape(-1)[:count] ^= 1
        found.add(nearer, np.array([count]))
        assert found.labels[0] == count


def test_few_pairs_are_compared_in_all_pixels(monkeypatch):
    """Ten clusters of images far apart: once one of each is known, other clusters are never looked at."""
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 256, (10, 1, 28, 28))
    x, real = ((centres[np.arange(n) % 10] + rng.integers(-20, 21, (n, 1, 28, 28))).clip(0, 255) for n in (3000, 500))
    compared = []
    nearest = generated._nearest
    monkeypatch.setattr(generated, "_nearest", lambda *args: compared.append(len(args[3])) or nearest(*args))
    monkeypatch.setattr(generated, "FEW", 1 / 5)
    labels = np.arange(3000) % 10
    found = score(chunks(x.astype(np.uint8), labels, 1000, 2000), real.astype(np.uint8), np.arange(500) % 10)
    assert found == {ERROR: 0}
    assert compared[0] == 1000 * 500
    assert 0 < max(compared[1:]) < 0.11 * 1000 * 500


def test_right_classes_give_no_error_and_swapped_ones_are_errors():
    x, y = images(60, 10)
    real_x, real_y = images(30, 10, seed=1)
    assert score([(x, y)], real_x, real_y) == {ERROR: 0}
    assert score([(x, (y + 1) % 3)], real_x, real_y) == {ERROR: 1}
    assert score([(x, np.array([1, 0, 2])[y])], real_x, real_y) == {ERROR: pytest.approx(2 / 3)}


def test_one_image_a_class_and_images_without_content():
    x, y = images(3, 0)
    assert score([(x, y)], *images(9, 10, seed=1)) == {ERROR: 0}
    black = np.zeros((6, 1, 4, 4), np.uint8)
    assert score([(black, np.arange(6) % 3)], black, np.arange(6) % 3) == {ERROR: pytest.approx(2 / 3)}


def test_chunks_are_read_one_at_a_time():
    """Each is overwritten by the next, as an iterator that reuses its memory does."""
    x, y = images(60, 150)
    real = images(30, 150, seed=1)
    x_buffer, y_buffer = np.empty_like(x[:20]), np.empty_like(y[:20])

    def overwriting():
        for part in range(0, 60, 20):
            x_buffer[:], y_buffer[:] = x[part : part + 20], y[part : part + 20]
            yield x_buffer, y_buffer

    assert score(overwriting(), *real) == score([(x, y)], *real)


def test_refusals():
    x, y = images(20)
    real = images(10, seed=1)
    with pytest.raises(ValueError, match=r"generated images are float64 .* not uint8 \(N, C, H, W\)"):
        score([(x / 255, y)], *real)
    with pytest.raises(ValueError, match=r"real images are uint8 \(10, 36\)"):
        score([(x, y)], real[0].reshape(10, -1), real[1])
    with pytest.raises(ValueError, match=r"with labels \(19,\)"):
        score([(x, y[1:])], *real)
    with pytest.raises(ValueError, match=r"generated images are uint8 \(0, 1, 6, 6\)"):
        score([(x[:0], y[:0])], *real)
    with pytest.raises(ValueError, match=r"generated images are \(1, 5, 6\) and real ones \(1, 6, 6\)"):
        score([(x[:, :, 1:], y)], *real)
    with pytest.raises(ValueError, match="generated images have 20 without a label"):
        score([(x, np.full(20, -1))], *real)
    with pytest.raises(ValueError, match="no generated image is of class 0, 2, which real ones have"):
        score([(x[y == 1], y[y == 1])], *real)
    with pytest.raises(ValueError, match="20 generated images, but the error with 21 is asked for"):
        score([(x, y)], *real, sizes=[5, 21])
    with pytest.raises(ValueError, match="0 generated images, but the error with 1 is asked for"):
        score([], *real)
    for sizes in ([0], [5, 5]):
        with pytest.raises(ValueError, match="are at least 1, and each once"):
            score([(x, y)], *real, sizes=sizes)


def test_real_digits_as_the_paper_has_them(real_data):
    """The nearest of 5,000 by whole numbers; the paper's 50,000 give 3.1 % on all test images."""
    train, test = (MNIST(real_data, train=split) for split in (True, False))
    x, real_x = train.data[:5000, None].numpy(), test.data[:200, None].numpy()
    y, real_y = train.targets[:5000].numpy(), test.targets[:200].numpy()
    known, asked = (images.reshape(len(images), -1).astype(np.int64) for images in (x, real_x))
    squares = (known**2).sum(1) - 2 * asked @ known.T
    expected = (y[squares.argmin(1)] != real_y).mean()
    assert score(chunks(x, y, 1000, 3000), real_x, real_y) == {ERROR: expected}
    assert expected < 0.1
