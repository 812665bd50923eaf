"""The distance that chooses `best`: a metric in behaviour, worse for worse images, blind to order."""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from dcgan import wasserstein


def images(seed, count=256, smooth=0.0):
    stream = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 3, 32, 32, generator=stream) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
    return (1 - smooth) * noise + smooth * blurred


def test_zero_for_the_same_images_in_any_order():
    real = images(0)
    assert wasserstein.Reference(real).distance(real) == 0
    assert wasserstein.Reference(real).distance(real.flip(0)) == pytest.approx(0, abs=1e-6)


def test_worse_images_are_further_away_and_collapse_is_furthest():
    real = images(0, smooth=0.5)
    again = wasserstein.Reference(real).distance(images(1, smooth=0.5))
    near = wasserstein.Reference(real).distance(images(2, smooth=0.75))
    far = wasserstein.Reference(real).distance(images(2, smooth=1.0))
    collapsed = wasserstein.Reference(real).distance(real[:1].expand_as(real))
    assert again < near < far
    assert collapsed > 2 * again


def doubled(values, axis):
    """Linear interpolation to twice as many, between the centres of pixels."""
    places = np.arange(2 * values.shape[axis])
    other = np.clip(places // 2 + np.where(places % 2, 1, -1), 0, values.shape[axis] - 1)
    return 0.75 * np.repeat(values, 2, axis) + 0.25 * np.take(values, other, axis)


@pytest.mark.parametrize("size", [14, 28])
def test_the_distance_is_scipys_of_each_band(size):
    """The mean over levels and directions of SciPy's one-dimensional distance on the same normalised patches."""
    sets = [images(0, 32)[:, :, :size, :size], images(1, 32, 0.3)[:, :, :size, :size]]
    got = wasserstein.Reference(sets[0], seed=3).distance(sets[1])
    levels = [[each.numpy() for each in sets]]
    if size == 28:
        coarse = [each.reshape(32, 3, 14, 2, 14, 2).mean((3, 5)) for each in levels[0]]
        fine = [each - doubled(doubled(low, 2), 3) for each, low in zip(levels[0], coarse, strict=True)]
        levels = [fine, coarse]
    generator, expected = torch.Generator().manual_seed(3), []
    for level in levels:
        side = level[0].shape[-1] - 6
        corners = torch.randint(side, (wasserstein.PATCHES, 2), generator=generator).tolist()
        flat = []
        for batch in level:
            patches = np.concatenate([batch[:, :, y : y + 7, x : x + 7] for y, x in corners])
            patches = (patches - patches.mean((0, 2, 3), keepdims=True)) / patches.std((0, 2, 3), keepdims=True, ddof=1)
            flat.append(patches.reshape(len(patches), -1))
        directions = torch.randn(147, wasserstein.DIRECTIONS, generator=generator).numpy()
        directions /= np.linalg.norm(directions, axis=0)
        expected.append(np.mean([wasserstein_distance(flat[0] @ d, flat[1] @ d) for d in directions.T]))
    assert float(got) == pytest.approx(np.mean(expected), rel=1e-4)


def test_every_size_has_levels_down_to_fourteen_pixels():
    assert [len(wasserstein._pyramid(torch.zeros(1, 1, s, s))) for s in (28, 32, 64, 96, 128)] == [2, 2, 3, 3, 4]


def test_sets_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="different shapes"):
        wasserstein.Reference(images(0, 4)).distance(images(0, 5))
