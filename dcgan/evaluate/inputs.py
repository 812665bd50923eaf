"""What the protocols accept, and which rows they learn from and choose on: checks and stratified selection."""

import numpy as np

from dcgan.config import Evaluate
from dcgan.evaluate.samples import BLOCK_BYTES, Samples

Labelled = tuple[np.ndarray, np.ndarray]  # features (N, F) and labels (N,)


def check(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    validation: Labelled | None = None,
) -> None:
    """Raises ValueError, naming the split, for arrays that no protocol can score.

    Rejected: an empty split, features that are not (N, F) with one F, labels that are not (N,), a NaN or an infinity,
    images without a label (-1), a single class in train.
    """
    splits = {"train": (train_x, train_y), "test": (test_x, test_y)} | (
        {"validation": validation} if validation else {}
    )
    for split, (features, labels) in splits.items():
        if features.ndim != 2 or labels.shape != features.shape[:1] or not features.size:
            shapes = f"features {features.shape} and labels {labels.shape}"
            raise ValueError(f"{split} has {shapes}, not (N, F) and (N,) with N and F at least 1")
        _check_finite(split, features)
        if labels.min() < 0:
            raise ValueError(f"{split} has {(labels < 0).sum()} images without a label: this protocol needs labels")
        if train_x.shape[1] != features.shape[1]:
            raise ValueError(f"train has {train_x.shape[1]} features per image and {split} {features.shape[1]}")
    if (train_y == train_y[0]).all():
        raise ValueError(f"train has one class only, {train_y[0]}: there is nothing to tell apart")


def _check_finite(split: str, features: np.ndarray) -> None:
    rows = max(1, BLOCK_BYTES["cpu"] // (4 * features.shape[1]))
    for first in range(0, len(features), rows):
        bad = np.argwhere(~np.isfinite(features[first : first + rows]))
        if len(bad):
            row, column = bad[0]
            value = features[first + row, column]
            raise ValueError(f"{split} features hold {value}: image {first + row}, feature {column}")


def check_classes(train_y: np.ndarray, test_y: np.ndarray) -> None:
    """Raises ValueError if test has a class that can't be learned because train has no image of it."""
    missing = np.setdiff1d(test_y, train_y)
    if len(missing):
        raise ValueError(f"train has no image of class {', '.join(map(str, missing))}, which test has")


def check_labels(labels: dict[str, np.ndarray], settings: Evaluate) -> None:
    """Raises ValueError, before there are features, if a protocol of `settings` can't be scored with these labels.

    labels: int64 (N,) of train, test and, where the data set has it, validation.
    """
    seed, train = settings.seed, labels["train"]
    for protocol in settings.protocols:
        if protocol == "clustering":
            continue
        for split, found in labels.items():
            if found.min() < 0:
                raise ValueError(f"{split} has {(found < 0).sum()} images without a label: {protocol} needs labels")
        check_classes(train, labels["test"])
        if protocol == "svm_few_labels":
            pool = train if "validation" in labels else train[hold_out(train, seed)[0]]
            draw(pool, settings.labels_per_class, (seed, 0))
            continue
        fit = labelled(train, settings.labels, seed)
        if "validation" not in labels:
            fit, _ = hold_out(train[fit], seed)
        if protocol == "knn":
            check_neighbours(settings, len(fit), "validation" in labels)


def check_neighbours(settings: Evaluate, count: int, validation: bool) -> None:
    """Raises ValueError if the largest of `settings.neighbours` exceeds the `count` of images to compare with."""
    if (most := max(settings.neighbours)) > count:
        raise ValueError(
            f"evaluate.neighbours={most}, but train has only {count} labelled images to compare with"
            + ("" if validation else " after a fifth is held out")
        )


def labelled(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted rows, int64, of `count` random labels (0: all) that keep the classes' shares to within one image.

    Raises ValueError if there are fewer than `count` labels, or `count` is too small to include each class.
    """
    if count == 0:
        return np.arange(len(labels))
    if count > len(labels):
        raise ValueError(f"evaluate.labels={count}, but train has {len(labels)} labels")
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / len(labels))
    shares = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(shares - exact, kind="stable")[: count - shares.sum()]
    shares[largest_remainders] += 1
    if shares.min() == 0:
        raise ValueError(f"evaluate.labels={count} leaves none of class {classes[shares.argmin()]}: ask for more")
    return _choose(labels, dict(zip(classes, shares, strict=True)), np.random.default_rng(seed))


def hold_out(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows to fit on and rows held out: a random fifth of each class, at least one image where it has two.

    Raises ValueError if no class has two.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    if sizes.max() < 2:
        raise ValueError(f"{len(labels)} labels, one per class: none can be held out to choose a setting")
    shares = np.where(sizes > 1, np.maximum(sizes // 5, 1), 0)
    held = _choose(labels, dict(zip(classes, shares, strict=True)), np.random.default_rng(seed))
    return np.setdiff1d(np.arange(len(labels)), held), held


def split_for_choice(
    x: Samples, y: np.ndarray, validation: Labelled | None, seed: int
) -> tuple[np.ndarray, Samples, np.ndarray]:
    """Rows of x to learn from, and the samples and labels that settings are chosen on.

    Those are `validation`, scaled as x is, or else a fifth of x, which is then not among the rows. y: labels (N,) of x.
    """
    if validation:
        return np.arange(len(y)), x.like(validation[0]), validation[1]
    fit, held = hold_out(y, seed)
    return fit, x.take(held), y[held]


def draw(labels: np.ndarray, per_class: int, seed: tuple[int, ...]) -> np.ndarray:
    """Sorted rows, int64, of `per_class` random labels of each class. Raises ValueError if a class has fewer."""
    classes, sizes = np.unique(labels, return_counts=True)
    if sizes.min() < per_class:
        raise ValueError(
            f"evaluate.labels_per_class={per_class}, but class {classes[sizes.argmin()]} has {sizes.min()} labels "
            "to draw from"
        )
    return _choose(labels, dict.fromkeys(classes, per_class), np.random.default_rng(seed))


def _choose(labels: np.ndarray, counts: dict[int, int], rng: np.random.Generator) -> np.ndarray:
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:count] for label, count in counts.items()]
    return np.sort(np.concatenate(chosen))


def raw_pixels(images: np.ndarray) -> np.ndarray:
    """uint8 (N, C, H, W) as float32 (N, C * H * W) in [0, 1]."""
    pixels = images.reshape(len(images), -1).astype(np.float32)
    pixels /= 255  # in place: a float32 copy of Tiny ImageNet takes 5 GB
    return pixels
