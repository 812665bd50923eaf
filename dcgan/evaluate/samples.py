"""What the protocols share: input checks, features standardised a block at a time, stratified selection of rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dcgan.config import Evaluate

# Of float32 features: on a CPU a block is still cached when a second product reads it; a GPU is kept busy.
BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28}

Labelled = tuple[np.ndarray, np.ndarray]  # features (N, F) and labels (N,)


class NotConvergedError(RuntimeError):
    """A classifier has not come close enough to its minimum; the message says what helps."""


@dataclass(frozen=True)
class Samples:
    """Chosen rows of a feature array, read as (features - mean) * inverse_scale.

    Only one block of rows at a time exists in that form, so 50,000 x 28,672 features are held once and never copied.
    features: float16 or float32 (N, F) on the device that computes. rows: int64 (n,), indices into it, or a slice.
    mean, inverse_scale: float32 (F,), on the same device.
    """

    features: Tensor
    rows: Tensor | slice
    mean: Tensor
    inverse_scale: Tensor

    @classmethod
    def of(cls, features: np.ndarray, device: str = "cpu") -> "Samples":
        """All rows of (N, F), unscaled; copied to the device if that is not the CPU."""
        tensor = torch.from_numpy(features).to(device)
        width = tensor.shape[1]
        return cls(tensor, slice(0, len(tensor)), torch.zeros(width, device=device), torch.ones(width, device=device))

    @classmethod
    def centred(cls, features: np.ndarray, device: str = "cpu") -> "Samples":
        """All rows of (N, F), each feature with mean 0 over them, so that products in float32 lose no digits."""
        plain = cls.of(features, device)
        total = torch.zeros(plain.width, dtype=torch.float64, device=device)
        for _, block in plain.blocks():
            total += block.sum(0, dtype=torch.float64)
        return replace(plain, mean=(total / len(plain)).float())

    @classmethod
    def standardised(cls, features: np.ndarray, device: str = "cpu") -> "Samples":
        """All rows of (N, F), each feature with mean 0 and variance 1 over them; a constant feature becomes 0."""
        centred = cls.centred(features, device)
        squares = torch.zeros(centred.width, dtype=torch.float64, device=device)
        for _, block in centred.blocks():
            squares += block.double().square_().sum(0)
        # Exactly 0 for a constant feature: its mean in float64 rounds to the constant in float32.
        scale = torch.where(squares == 0, 1.0, (squares / len(centred)).sqrt())
        return replace(centred, inverse_scale=(1 / scale).float())

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    @property
    def width(self) -> int:
        """F, the number of features."""
        return self.features.shape[1]

    @property
    def device(self) -> torch.device:
        return self.features.device

    def take(self, rows: np.ndarray) -> "Samples":
        """The samples at these positions of this selection."""
        chosen = torch.from_numpy(rows).to(self.device)
        return replace(self, rows=chosen + self.rows.start if isinstance(self.rows, slice) else self.rows[chosen])

    def like(self, features: np.ndarray) -> "Samples":
        """All rows of other features, with this selection's mean and scale."""
        tensor = torch.from_numpy(features).to(self.device)
        return replace(self, features=tensor, rows=slice(0, len(tensor)))

    def blocks(self, size: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Positions and the samples there, float32 (at most `size`, F); 0: as many as fit the cache.

        A block is overwritten by the next one.
        """
        size = size or max(16, BLOCK_BYTES[self.device.type] // (4 * self.width))
        buffer = torch.empty(min(size, len(self)), self.width, device=self.device)
        for first in range(0, len(self), size):
            where = slice(first, min(first + size, len(self)))
            if isinstance(self.rows, slice):
                chosen = self.features[self.rows.start + where.start : self.rows.start + where.stop]
            else:
                chosen = self.features[self.rows[where]]
            yield where, torch.sub(chosen, self.mean, out=buffer[: len(chosen)]).mul_(self.inverse_scale)

    def parts(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Columns and all samples' features there, float32 (n, at most `size`)."""
        for first in range(0, self.width, size):
            where = slice(first, min(first + size, self.width))
            chosen = self.features[:, where][self.rows]
            yield where, (chosen - self.mean[where]).mul_(self.inverse_scale[where])


_device: ContextVar[str] = ContextVar("device", default="auto")


@contextmanager
def computing_on(wanted: str) -> Iterator[None]:
    """Within the body, protocols compute on an experiment's `compute.device`: auto, cpu or cuda."""
    before = _device.set(wanted)
    try:
        yield
    finally:
        _device.reset(before)


def device(wanted: str = "auto") -> str:
    """`wanted`; if "auto", what `computing_on` says; if that is "auto" too, cuda where there is one, else cpu."""
    for one in (wanted, _device.get()):
        if one != "auto":
            return one
    return "cuda" if torch.cuda.is_available() else "cpu"


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
