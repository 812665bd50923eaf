"""L2-SVM on features: accuracy with all labels, and with few labels a class over random draws.

The classifier of the paper (section 5): "a regularized linear L2-SVM" on the discriminator's features. No grid of C
and no scaling were published. Here every feature is standardised with its mean and standard deviation over all
training images (which takes none of their labels), and C is chosen on a held-out fifth of train.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dcgan.config import Evaluate
from dcgan.evaluate.newton import minimise, scores
from dcgan.evaluate.samples import Samples, check, check_classes, draw, hold_out, labelled

TOLERANCE = 1e-3  # of the objective, as a proven bound; on digits the distance itself was at most 6e-5


class L2SVM:
    """One-vs-rest linear SVM with squared hinge loss: the objective of scikit-learn's `LinearSVC`.

    For each class, with y = +1 for its samples and -1 for the others, minimises

        0.5 * (|w|^2 + b^2) + C * sum_i max(0, 1 - y_i (w x_i + b))^2

    (the bias is the weight of a constant feature 1 and regularised like the others) to within `tol` of the objective.
    Two classes get two rows as well, one the other's negative. Computes in float32; x may be `Samples`, which are
    standardised on the way, or an array, which is taken as it is.

    Learned: `classes_` (K,), `coef_` float32 (K, F), `intercept_` float32 (K,), `objective_` float64 (K,).
    """

    def __init__(self, C: float = 1.0, tol: float = TOLERANCE) -> None:  # noqa: N803
        self.C = C
        self.tol = tol

    def fit(self, x: Samples | np.ndarray, y: np.ndarray, start: "L2SVM | None" = None) -> "L2SVM":
        """Learn from x (N, F) and labels y (N,), beginning at the weights of `start`, fitted to the same classes.

        Raises ValueError if y has one class, RuntimeError if float32 does not reach `tol` (C far too large).
        """
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(f"train has one class only, {self.classes_[0]}: there is nothing to tell apart")
        signs = torch.from_numpy(np.where(y == self.classes_[:, None], 1, -1).astype(np.float32))
        x = _samples(x)
        begin = torch.zeros(len(signs), x.width + 1) if start is None else start._weights()
        weights, self.objective_ = minimise(x, signs, torch.full((len(signs), 1), self.C), begin, self.tol)
        self.coef_, self.intercept_ = weights[:, :-1].numpy(), weights[:, -1].numpy()
        return self

    def decision_function(self, x: Samples | np.ndarray) -> np.ndarray:
        """Each class's w x + b, float32 (N, K)."""
        return scores(_samples(x), self._weights()).T.numpy()

    def predict(self, x: Samples | np.ndarray) -> np.ndarray:
        """The class with the highest score, (N,)."""
        return self.classes_[self.decision_function(x).argmax(1)]

    def _weights(self) -> torch.Tensor:
        return torch.from_numpy(np.column_stack([self.coef_, self.intercept_]))


def _samples(x: Samples | np.ndarray) -> Samples:
    return x if isinstance(x, Samples) else Samples.of(x)


def score(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, settings: Evaluate
) -> dict[str, float]:
    """`svm/accuracy` on test (0 to 1, higher is better) and `svm/c`, the C that was chosen.

    x: float32 (N, F), y: int64 (N,). Of `settings.labels` random labels, the classes in proportion (0: all), a fifth
    is held out; the C of `settings.c_grid` with the highest accuracy there, the smaller where two are equal, is used
    to fit all of them; test is scored once. Raises ValueError for input that `samples` refuses.
    """
    check(train_x, train_y, test_x, test_y)
    check_classes(train_y, test_y)
    rows = labelled(train_y, settings.labels, settings.seed)
    train, labels = Samples.standardised(train_x), train_y[rows]
    fit, held = hold_out(labels, settings.seed)
    best = (-1.0, L2SVM())
    for model in _path(train.take(rows[fit]), labels[fit], settings.c_grid):
        accuracy = float((model.predict(train.take(rows[held])) == labels[held]).mean())
        best = max(best, (accuracy, model), key=lambda pair: pair[0])
    chosen = best[1]
    model = L2SVM(C=chosen.C).fit(train.take(rows), labels, start=chosen)
    return {"svm/accuracy": float((model.predict(train.like(test_x)) == test_y).mean()), "svm/c": chosen.C}


def score_few_labels(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, settings: Evaluate
) -> dict[str, float]:
    """`svm_few_labels/accuracy` (higher is better), `svm_few_labels/accuracy_std` over draws, `svm_few_labels/c`.

    x: float32 (N, F), y: int64 (N,). A fifth of train is held out; `settings.draws` times, `settings.labels_per_class`
    random labels of each class are drawn from the rest and an SVM is fitted for each C. One C serves all draws: that
    with the highest mean accuracy on the held-out fifth, the smaller where two are equal. Its SVMs are then scored on
    test: mean, and standard deviation with divisor draws - 1 (the SVHN protocol's interval is 1.96 of it).
    Raises ValueError for input that `samples` refuses, also where a class has too few labels to draw.
    """
    check(train_x, train_y, test_x, test_y)
    check_classes(train_y, test_y)
    pool, held = hold_out(train_y, settings.seed)
    train = Samples.standardised(train_x)
    draws = [pool[draw(train_y[pool], settings.labels_per_class, (settings.seed, i))] for i in range(settings.draws)]
    models = [list(_path(train.take(rows), train_y[rows], settings.c_grid)) for rows in draws]
    by_c = [list(same_c) for same_c in zip(*models, strict=True)]
    validation = [_accuracies(same_c, train.take(held), train_y[held]).mean() for same_c in by_c]
    chosen = by_c[int(np.argmax(validation))]
    accuracies = _accuracies(chosen, train.like(test_x), test_y)
    return {
        "svm_few_labels/accuracy": float(accuracies.mean()),
        "svm_few_labels/accuracy_std": float(accuracies.std(ddof=1)),
        "svm_few_labels/c": chosen[0].C,
    }


def _path(x: Samples, y: np.ndarray, grid: Sequence[float]) -> Iterator[L2SVM]:
    """A fitted SVM for each C from the smallest up, each begun at the one before: the larger, the harder."""
    model = None
    for c in sorted(set(grid)):
        model = L2SVM(C=c).fit(x, y, start=model)
        yield model


def _accuracies(models: Sequence[L2SVM], x: Samples, y: np.ndarray) -> np.ndarray:
    """(len(models),): each model's share of right predictions, in one pass over the features."""
    all_scores = scores(x, torch.cat([model._weights() for model in models]))
    return np.array(
        [
            (model.classes_[own.argmax(0).numpy()] == y).mean()
            for model, own in zip(models, all_scores.chunk(len(models)), strict=True)
        ]
    )
