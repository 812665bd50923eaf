"""The 1-layer k-means baseline: small patches are compared with learned ones, and an SVM classifies the similarities.

Coates, Lee and Ng, "An analysis of single-layer networks in unsupervised feature learning" (AISTATS 2011), with the
constants of their published code. Published for CIFAR-10: 80.6 % with 4,800 centroids and 77.9 % with 1,600.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from dcgan.config import Evaluate
from dcgan.evaluate.inputs import check, check_classes, draw, hold_out
from dcgan.evaluate.svm import L2SVM, score_few_labels

# All from the published code.
SIDE = 6  # pixels of a patch
PATCHES = 400_000
ITERATIONS = 50
BLOCK_PATCHES = 1_000  # compared with all centroids at once; the result does not depend on it
CONTRAST_FLOOR = 10.0  # added to a patch's variance, pixels being 0 to 255
EIGENVALUE_FLOOR = 0.1  # added to each variance before whitening
FEATURE_FLOOR = 0.01  # added to a feature's variance before the SVM
PENALTY = 100.0  # on the mean squared margin violation: C is this divided by the number of images


class PatchKMeans(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Features of images: how near the patches of each quarter of an image are to each of `centroids` patches.

    A 6 x 6 patch at any pixel becomes w = whitening_ ((x - mean x) / sqrt(var x + 10) - mean_). Feature k of a quarter
    is the sum of max(0, mean z - z_k) over its patches, z_k = |w - centroids_k| (the "triangle", section 3.2.2). Of the
    H - 5 rows of patches the upper quarters have half, rounded up; columns likewise. The features of each quarter are
    contiguous: upper left, upper right, lower left, lower right.

    `fit` draws 400,000 patches, equally many from each image (or, from few images, only as many as they have),
    decorrelates them (ZCA) and runs 50 iterations of k-means from `seed`.
    Learned: `mean_` (D,), `whitening_` (D, D), `centroids_` (centroids, D), all float32; D = 36 C, ordered row, column,
    channel. Images: uint8 (N, C, H, W), of any size from 6 x 6 up, which may differ between `fit` and `transform`.
    """

    def __init__(self, centroids: int = 1600, seed: int = 0) -> None:
        self.centroids = centroids
        self.seed = seed

    def fit(self, images: np.ndarray, y: object = None) -> "PatchKMeans":
        """Learn from images; y, which pipelines pass, is ignored.

        Raises ValueError for what is not uint8 (N, C, H, W) or too small, or for more centroids than patches.
        """
        views = _views(images)
        count = min(PATCHES, views[..., 0, 0, 0].size)
        if not 1 <= self.centroids <= count:
            raise ValueError(f"centroids={self.centroids}, not 1 to {count}, the patches of {len(images)} images")
        rng = np.random.default_rng(self.seed)
        image = np.resize(rng.permutation(len(images)), count)
        row, column = (rng.integers(size, size=count) for size in views.shape[1:3])
        patches = _normalised(views[image, row, column])
        mean, whitening = whitener(patches)
        self.mean_, self.whitening_ = mean.numpy(), whitening.numpy()
        self.centroids_ = cluster((patches - mean) @ whitening, self.centroids, rng).numpy()
        return self

    def transform(self, images: np.ndarray) -> np.ndarray:
        """float32 (N, 4 centroids), at least 0. Raises ValueError for images that do not match those of `fit`."""
        check_is_fitted(self)
        views = _views(images)
        if views[0, 0, 0].size != len(self.mean_):
            raise ValueError(f"images have {images.shape[1]} channels, not the {len(self.mean_) // SIDE**2} of fit")
        mean, whitening, centroids = map(torch.from_numpy, (self.mean_, self.whitening_, self.centroids_))
        features = np.empty((len(images), 4 * len(centroids)), np.float32)

        def work(image: int) -> None:
            places = views[image]
            patches = (_normalised(places.reshape(-1, *places.shape[2:])) - mean) @ whitening
            features[image] = _pooled(_triangle(patches, centroids).view(*places.shape[:2], -1)).numpy()

        _each(work, range(len(images)))
        return features


def score(
    train_images: np.ndarray,
    train_y: np.ndarray,
    test_images: np.ndarray,
    test_y: np.ndarray,
    settings: Evaluate,
    centroids: int,
) -> dict[str, float]:
    """`patch_kmeans/accuracy` and `/few_labels_accuracy` on test (0 to 1, higher is better), the latter's `_std`, `_c`.

    images: uint8 (N, C, H, W), y: int64 (N,). The features are learned on all training images without labels.
    `accuracy` is that of the published classifier, in which nothing is chosen: `standardise`, then an L2-SVM with
    C = 100 / N. The others are those of `svm.score_few_labels`, so that these features and a discriminator's face the
    same test: C is chosen on a fifth of train that is held out of all draws. No C was published for few labels.
    Raises ValueError for input that `PatchKMeans` or `inputs` rejects, or if a class has too few labels to draw.
    """
    # Reject bad input before the work.
    _views(train_images), _views(test_images)
    check(train_images.reshape(len(train_images), -1), train_y, test_images.reshape(len(test_images), -1), test_y)
    check_classes(train_y, test_y)
    draw(train_y[hold_out(train_y, settings.seed)[0]], settings.labels_per_class, (settings.seed,))
    model = PatchKMeans(centroids, settings.seed).fit(train_images)
    train_x, test_x = model.transform(train_images), model.transform(test_images)
    standardise(train_x, test_x)
    svm = L2SVM(C=PENALTY / len(train_x)).fit(train_x, train_y)
    few = score_few_labels(train_x, train_y, test_x, test_y, settings)
    return {
        "patch_kmeans/accuracy": float((svm.predict(test_x) == test_y).mean()),
        "patch_kmeans/few_labels_accuracy": few["svm_few_labels/accuracy"],
        "patch_kmeans/few_labels_accuracy_std": few["svm_few_labels/accuracy_std"],
        "patch_kmeans/few_labels_c": few["svm_few_labels/c"],
    }


def standardise(train_x: np.ndarray, test_x: np.ndarray) -> None:
    """In place: x becomes (x - mean) / sqrt(var + 0.01), mean and var (F,) being those of train. x: float32 (N, F)."""
    mean = train_x.mean(0, dtype=np.float64).astype(np.float32)
    train_x -= mean
    test_x -= mean
    variance = np.einsum("nf,nf->f", train_x, train_x, dtype=np.float64) / len(train_x)
    scale = np.sqrt(variance + FEATURE_FLOOR).astype(np.float32)
    train_x /= scale
    test_x /= scale


def whitener(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the symmetric (D, D) of ZCA whitening for patches (n, D): (patches - mean) @ it is uncorrelated.

    A direction of variance v gets v / (v + 0.1) (section 3.1.2 of the paper, with the constant of its code).
    """
    exact = patches.double()
    values, vectors = torch.linalg.eigh(exact.T.cov(correction=0))
    whitening = vectors * (values + EIGENVALUE_FLOOR).rsqrt() @ vectors.T
    return exact.mean(0).float(), whitening.float()


def cluster(patches: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Centroids (count, D) of patches (n, D) after 50 iterations of k-means from small random ones.

    A centroid that is nearest to no patch becomes a random patch; the published code makes it zero.
    """
    centroids = 0.1 * torch.from_numpy(rng.standard_normal((count, patches.shape[1]), np.float32))
    for _ in range(ITERATIONS):
        nearest = _nearest(patches, centroids)
        sizes = nearest.bincount(minlength=count)
        centroids = torch.zeros_like(centroids).index_add_(0, nearest, patches) / sizes[:, None]
        empty = sizes == 0
        centroids[empty] = patches[rng.choice(len(patches), int(empty.sum()), replace=False)]
    return centroids


def _views(images: np.ndarray) -> np.ndarray:
    """All patches of uint8 images (N, C, H, W), as a view (N, H - 5, W - 5, 6, 6, C)."""
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size or min(images.shape[2:]) < SIDE:
        raise ValueError(
            f"images are {images.dtype} {images.shape}, not uint8 (N, C, H, W) with N and C at least 1, "
            f"H and W at least {SIDE}"
        )
    return np.lib.stride_tricks.sliding_window_view(images, (SIDE, SIDE), (2, 3)).transpose(0, 2, 3, 4, 5, 1)


def _normalised(patches: np.ndarray) -> Tensor:
    """float32 (n, D) of (n, 6, 6, C): each patch less its mean, divided by sqrt(variance + 10) over all its values."""
    rows = torch.from_numpy(patches.astype(np.float32, order="C")).flatten(1)
    rows -= rows.mean(1, keepdim=True)
    variance = torch.linalg.vector_norm(rows, dim=1, keepdim=True).square_() / (rows.shape[1] - 1)
    return rows.div_((variance + CONTRAST_FLOOR).sqrt_())


def _distances(patches: Tensor, centroids: Tensor) -> Tensor:
    """(n, K): squared, from each patch (n, D) to each centroid (K, D), less the patch's own squared length.

    A product of matrices written as a convolution of patches that each give one pixel: on a non-Intel processor with
    AVX-512, PyTorch's convolution takes 1.2 ms where its product takes 2.7 (729 x 108 x 1,600).
    """
    return F.conv2d(_as_images(patches), _as_images(-2 * centroids), centroids.square().sum(1)).flatten(1)


def _as_images(rows: Tensor) -> Tensor:
    return rows.view(len(rows), SIDE, SIDE, -1).permute(0, 3, 1, 2)


def _nearest(patches: Tensor, centroids: Tensor) -> Tensor:
    """int64 (n,): the number of each patch's nearest centroid."""
    nearest = np.empty(len(patches), np.int64)

    def work(first: int) -> None:
        where = slice(first, first + BLOCK_PATCHES)
        nearest[where] = _distances(patches[where], centroids).numpy().argmin(1)  # PyTorch's takes ten times as long

    _each(work, range(0, len(patches), BLOCK_PATCHES))
    return torch.from_numpy(nearest)


def _triangle(patches: Tensor, centroids: Tensor) -> Tensor:
    """(n, K): how much nearer than the mean distance to all centroids each one is, at least 0."""
    squared = _distances(patches, centroids).add_(patches.square().sum(1, keepdim=True))
    z = squared.clamp_(min=0).sqrt_()  # rounding may leave less than 0
    return torch.sub(z.mean(1, keepdim=True), z, out=z).clamp_(min=0)


def _pooled(activations: Tensor) -> Tensor:
    """(4 K,): sums of (rows, columns, K) over quarters."""
    row, column = ((size + 1) // 2 for size in activations.shape[:2])
    # One axis at a time: both together take seven times as long.
    halves = [half.sum(0) for half in (activations[:row], activations[row:])]
    return torch.cat([part.sum(0) for half in halves for part in (half[:column], half[column:])])


def _each(work: Callable[[int], None], items: range) -> None:
    """Run independent work on as many threads as PyTorch may use, each computing on its own.

    Threads that share each of these short steps wait for each other more than they compute when other processes need
    the processors too.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, items):
                pass  # raises what `work` raised
    finally:
        torch.set_num_threads(threads)  # also the default of threads started later
