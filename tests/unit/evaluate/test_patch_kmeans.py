"""The 1-layer k-means baseline against its formulas in NumPy, a patch at a time, and scikit-learn's k-means."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torchvision.datasets import CIFAR10

from dcgan.config import Evaluate
from dcgan.evaluate import patch_kmeans
from dcgan.evaluate.patch_kmeans import PatchKMeans, cluster, score, standardise, whitener
from dcgan.evaluate.svm import L2SVM


def pictures(count=20, channels=3, height=9, width=9, seed=0):
    """Random images with edges and flat parts."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, channels, -(-height // 3), -(-width // 3)))
    fine = coarse.repeat(3, 2).repeat(3, 3)[:, :, :height, :width] + rng.integers(-20, 20, (count, 1, height, width))
    return fine.clip(0, 255).astype(np.uint8)


def normalised(patch):
    """Of (C, 6, 6): the vector, ordered row, column, channel, as the published code normalises it."""
    x = np.array([float(patch[c, i, j]) for i in range(6) for j in range(6) for c in range(len(patch))])
    return (x - x.mean()) / np.sqrt(x.var(ddof=1) + 10)


def features(image, mean, whitening, centroids):
    """By the formulas, in float64: for each patch z, the triangle, and the quarter that it belongs to."""
    rows, columns = image.shape[1] - 5, image.shape[2] - 5
    found = np.zeros((2, 2, len(centroids)))
    for i in range(rows):
        for j in range(columns):
            w = whitening @ (normalised(image[:, i : i + 6, j : j + 6]) - mean)
            z = np.array([np.sqrt(((w - c) ** 2).sum()) for c in centroids])
            found[int(i >= np.ceil(rows / 2)), int(j >= np.ceil(columns / 2))] += np.maximum(0, z.mean() - z)
    return found.reshape(-1)


@pytest.mark.parametrize("shape", [(3, 9, 9), (1, 12, 8), (3, 6, 6), (2, 6, 13), (3, 10, 10)])
def test_features_follow_the_formulas(shape):
    images = pictures(12, *shape)
    model = PatchKMeans(8).fit(images)
    found = model.transform(images[:3])
    learned = [array.astype(float) for array in (model.mean_, model.whitening_, model.centroids_)]
    assert found.shape == (3, 32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [features(image, *learned) for image in images[:3]], rtol=1e-4, atol=1e-3)


def test_27_rows_of_patches_are_14_above_and_13_below():
    image = pictures(1, 1, 32, 32)
    model = PatchKMeans(5).fit(image)
    learned = [array.astype(float) for array in (model.mean_, model.whitening_, model.centroids_)]
    upper_left, lower_right = features(image[0], *learned).reshape(4, 5)[[0, 3]]
    np.testing.assert_allclose(model.transform(image[:, :, :19, :19])[0].reshape(4, 5).sum(0), upper_left, rtol=1e-4)
    np.testing.assert_allclose(model.transform(image[:, :, 14:, 14:])[0].reshape(4, 5).sum(0), lower_right, rtol=1e-4)


def test_whitening_follows_the_formulas():
    """An image of 6 x 6 is one patch, so what is drawn is known: each image once."""
    images = pictures(50, 1, 6, 6)
    model = PatchKMeans(1).fit(images)
    patches = np.array([normalised(image) for image in images])
    values, vectors = np.linalg.eigh(np.cov(patches.T, bias=True))
    np.testing.assert_allclose(model.mean_, patches.mean(0), atol=1e-6)
    np.testing.assert_allclose(model.whitening_, vectors @ np.diag((values + 0.1) ** -0.5) @ vectors.T, atol=1e-4)
    np.testing.assert_allclose(model.centroids_, 0, atol=1e-4)  # the mean of the whitened patches


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(2, 12))
def test_whitened_patches_are_uncorrelated(seed, count, width):
    """Their covariance has the eigenvectors of the patches', and v / (v + 0.1) where that has v: near 1, or near 0."""
    rng = np.random.default_rng(seed)
    patches = rng.standard_normal((count, width)) * np.logspace(-3, 1, width)
    patches = patches @ rng.standard_normal((width, width)) + 5
    mean, whitening = whitener(torch.from_numpy(patches.astype(np.float32)))
    whitened = (patches - mean.numpy()) @ whitening.numpy().astype(float)
    covariance = np.cov(patches.T, bias=True).reshape(width, width)
    expected = covariance @ np.linalg.inv(covariance + 0.1 * np.eye(width))
    np.testing.assert_allclose(np.cov(whitened.T, bias=True).reshape(width, width), expected, atol=1e-3)
    np.testing.assert_allclose(whitened.mean(0), 0, atol=1e-3)


def blobs(count=300, width=36, groups=6, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, width))
    patches = centres[np.arange(count) % groups] + 0.3 * rng.standard_normal((count, width))
    return patches.astype(np.float32)


@pytest.mark.parametrize("iterations", [1, 2, 10])
@pytest.mark.parametrize("block", [7, 1000])
def test_clusters_are_those_of_scikit_learn(monkeypatch, iterations, block):
    monkeypatch.setattr(patch_kmeans, "ITERATIONS", iterations)
    monkeypatch.setattr(patch_kmeans, "BLOCK_PATCHES", block)
    patches = blobs()
    found = cluster(torch.from_numpy(patches), 4, np.random.default_rng(5)).numpy()
    begin = 0.1 * np.random.default_rng(5).standard_normal((4, 36), np.float32)
    reference = KMeans(4, init=begin, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    reference.fit(patches)
    np.testing.assert_allclose(found, reference.cluster_centers_, atol=1e-5)


def test_a_centroid_without_patches_becomes_a_random_one(monkeypatch):
    """Of six patches far away in one direction, one centroid is nearest to all: five others are none's nearest."""
    monkeypatch.setattr(patch_kmeans, "ITERATIONS", 1)
    patches = 1000 + np.arange(6 * 36, dtype=np.float32).reshape(6, 36)
    found = cluster(torch.from_numpy(patches), 6, np.random.default_rng(0)).numpy()
    is_mean, is_patch = np.isclose(found, patches.mean(0)).all(1), (found[:, None] == patches).all(2).any(1)
    assert (is_mean.sum(), (is_patch & ~is_mean).sum()) == (1, 5)
    assert len(np.unique(found, axis=0)) == 6
    monkeypatch.setattr(patch_kmeans, "ITERATIONS", 50)
    found = cluster(torch.from_numpy(patches), 6, np.random.default_rng(0)).numpy()
    np.testing.assert_array_equal(found[np.argsort(found[:, 0])], patches)


def test_patches_are_drawn_from_every_image_and_place(monkeypatch):
    """Also where there are more images than patches, in an order that says nothing."""
    monkeypatch.setattr(patch_kmeans, "ITERATIONS", 0)
    drawn = []

    def keep(patches):
        drawn.append(patches)
        return torch.zeros(len(patches), 36)

    monkeypatch.setattr(patch_kmeans, "_normalised", keep)
    images = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 1, 8, 8)).copy()
    monkeypatch.setattr(patch_kmeans, "PATCHES", 600)
    PatchKMeans(1).fit(images)
    assert (np.bincount(drawn[0][:, 0, 0, 0]) == 3).all()
    monkeypatch.setattr(patch_kmeans, "PATCHES", 100)
    PatchKMeans(1).fit(images)
    assert len(np.unique(drawn[1][:, 0, 0, 0])) == 100
    assert drawn[1][:, 0, 0, 0].max() > 150
    places = np.broadcast_to(np.arange(64, dtype=np.uint8).reshape(8, 8), (200, 1, 8, 8))
    PatchKMeans(1).fit(places)
    assert set(drawn[2][:, 0, 0, 0]) == {8 * i + j for i in range(3) for j in range(3)}


@settings(max_examples=20)
@given(st.integers(-20, 20))
def test_brightness_changes_nothing(shift):
    images = 40 + pictures(6) // 2
    moved = (images.astype(int) + shift).astype(np.uint8)
    model = PatchKMeans(5).fit(images)
    np.testing.assert_allclose(model.transform(moved), model.transform(images), atol=1e-3)


def test_the_seed_decides_what_is_learned():
    images = pictures()
    learned = [PatchKMeans(10, seed).fit(images).centroids_ for seed in (0, 0, 1)]
    np.testing.assert_array_equal(learned[0], learned[1])
    assert (learned[0] != learned[2]).any()


def test_constant_images_have_features_zero():
    images = np.full((4, 3, 8, 8), 77, np.uint8)
    model = PatchKMeans(5).fit(images)
    assert (model.centroids_ == 0).all()
    assert (model.transform(images) == 0).all()
    assert np.isfinite(PatchKMeans(1).fit(images[:1, :, :6, :6]).transform(pictures())).all()


def test_it_is_an_estimator():
    model = PatchKMeans(centroids=7, seed=3)
    assert clone(model).get_params() == {"centroids": 7, "seed": 3}
    images = pictures()
    with pytest.raises(NotFittedError):
        model.transform(images)
    expected = clone(model).fit(images).transform(images)
    np.testing.assert_array_equal(model.fit_transform(images), expected)
    labels = np.arange(len(images)) % 2
    assert make_pipeline(clone(model), StandardScaler(), LinearSVC()).fit(images, labels).predict(images).shape == (20,)
    larger = pictures(2, 3, 14, 11)
    assert model.transform(larger).shape == (2, 28)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pictures().astype(np.float32), r"images are float32 \(20, 3, 9, 9\), not uint8"),
        (pictures()[0], r"images are uint8 \(3, 9, 9\), not uint8 \(N, C, H, W\)"),
        (pictures(height=5), r"uint8 \(20, 3, 5, 9\), not .* H and W at least 6"),
        (pictures()[:0], r"uint8 \(0, 3, 9, 9\), not .* N and C at least 1"),
    ],
)
def test_refuses_what_are_no_images(images, message):
    with pytest.raises(ValueError, match=message):
        PatchKMeans(2).fit(images)
    with pytest.raises(ValueError, match=message):
        PatchKMeans(2).fit(pictures()).transform(images)


def test_refuses_more_centroids_than_patches_and_other_channels():
    with pytest.raises(ValueError, match="centroids=33, not 1 to 32, the patches of 2 images"):
        PatchKMeans(33).fit(pictures(2))
    with pytest.raises(ValueError, match="centroids=0, not 1 to"):
        PatchKMeans(0).fit(pictures())
    with pytest.raises(ValueError, match="images have 1 channels, not the 3 of fit"):
        PatchKMeans(2).fit(pictures()).transform(pictures(channels=1))


def test_standardise_takes_mean_and_variance_from_train():
    rng = np.random.default_rng(0)
    train_x = rng.normal(3, [1, 100, 0.01, 0], (500, 4)).astype(np.float32)
    test_x = rng.normal(3, 1, (5, 4)).astype(np.float32)
    mean, scale = train_x.astype(float).mean(0), np.sqrt(train_x.astype(float).var(0) + 0.01)
    expected = [(x - mean) / scale for x in (train_x, test_x)]
    standardise(train_x, test_x)
    np.testing.assert_allclose(train_x, expected[0], atol=1e-4)
    np.testing.assert_allclose(test_x, expected[1], atol=1e-4)


def stripes(count=240, noise=60, seed=0):
    """Noisy images of three classes: stripes across, stripes down, none."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    wave = 40 * np.sign(np.sin(np.arange(12) * np.pi / 2 + 0.5))
    pattern = np.array([wave[:, None] + np.zeros(12), wave + np.zeros((12, 1)), np.zeros((12, 12))])[labels]
    images = 128 + pattern[:, None] + noise * rng.standard_normal((count, 1, 12, 12))
    return images.clip(0, 255).astype(np.uint8), labels


def scored(noise=60, labels_per_class=10, draws=3, c_grid=(1e-4, 1e-3), **changed):
    arrays = {**dict(zip(("train_images", "train_y"), stripes(noise=noise), strict=True))}
    arrays |= dict(zip(("test_images", "test_y"), stripes(90, noise, seed=1), strict=True))
    chosen = Evaluate(labels_per_class=labels_per_class, draws=draws, c_grid=c_grid)
    return score(**(arrays | changed), settings=chosen, centroids=12)


def test_score_is_the_accuracy_of_the_published_classifier(monkeypatch):
    fitted = []

    class Watched(L2SVM):
        def fit(self, x, y):
            fitted.append((self.C, x.copy()))
            return super().fit(x, y)

    monkeypatch.setattr(patch_kmeans, "L2SVM", Watched)
    found = scored(noise=150)
    (train_images, train_y), (test_images, test_y) = stripes(noise=150), stripes(90, 150, seed=1)
    model = PatchKMeans(12, 0).fit(train_images)
    train_x, test_x = (model.transform(images).astype(float) for images in (train_images, test_images))
    mean, scale = train_x.mean(0), np.sqrt(train_x.var(0) + 0.01)
    svm = LinearSVC(C=100 / 240, dual=False).fit((train_x - mean) / scale, train_y)
    assert fitted[0][0] == 100 / 240
    np.testing.assert_allclose(fitted[0][1], (train_x - mean) / scale, atol=1e-3)
    assert found["patch_kmeans/accuracy"] == pytest.approx(svm.score((test_x - mean) / scale, test_y), abs=0.012)
    assert 0.4 < found["patch_kmeans/accuracy"] < 0.97
    assert found == scored(noise=150)


def test_easy_classes_score_one_and_random_labels_score_chance():
    found = scored(noise=10)
    assert found == {
        "patch_kmeans/accuracy": 1.0,
        "patch_kmeans/few_labels_accuracy": 1.0,
        "patch_kmeans/few_labels_accuracy_std": 0.0,
        "patch_kmeans/few_labels_c": 1e-4,
    }
    assert scored(noise=10, c_grid=(1e-2,))["patch_kmeans/few_labels_c"] == 1e-2
    mixed = scored(train_y=np.random.default_rng(0).permutation(240) % 3)
    assert max(mixed["patch_kmeans/accuracy"], mixed["patch_kmeans/few_labels_accuracy"]) < 0.6
    assert mixed["patch_kmeans/few_labels_accuracy_std"] > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels_per_class": 65}, "labels_per_class=65, but class 0 has 64 labels"),
        ({"draws": 1}, "draws"),
        ({"train_y": np.full(240, -1)}, "train has 240 images without a label"),
        ({"train_y": np.arange(240) % 2}, "train has no image of class 2, which test has"),
        ({"test_images": np.zeros((90, 1, 12, 12))}, "images are float64"),
        ({"test_images": np.zeros((90, 1, 13, 13), np.uint8)}, "144 features per image and test 169"),
    ],
)
def test_refuses_before_the_work(monkeypatch, changed, message):
    monkeypatch.setattr(PatchKMeans, "fit", lambda *_: pytest.fail("features were learned"))
    with pytest.raises(ValueError, match=message):
        scored(**changed)


def test_beats_raw_pixels_on_real_images(monkeypatch, real_data):
    monkeypatch.setattr(patch_kmeans, "PATCHES", 20_000)
    data = CIFAR10(real_data, train=False)
    images, labels = data.data.transpose(0, 3, 1, 2)[:3000], np.array(data.targets)[:3000]
    arrays = images[:2000], labels[:2000], images[2000:], labels[2000:]
    found = score(*arrays, Evaluate(labels_per_class=20, draws=2), 50)
    train_x, test_x = (part.reshape(-1, 3072).astype(np.float32) for part in arrays[::2])
    standardise(train_x, test_x)
    pixels = L2SVM(C=1e-4).fit(train_x, arrays[1]).predict(test_x)
    assert found["patch_kmeans/accuracy"] > (pixels == arrays[3]).mean() + 0.1
