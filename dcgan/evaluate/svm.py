"""L2-SVM on features: accuracy with all labels, and with few labels per class over random draws.

The classifier of the paper (section 5): "a regularized linear L2-SVM" on the discriminator's features. For CIFAR-10 no
grid of C and no scaling were published: here every feature is standardised, with statistics of train that use no
labels, and C is chosen on images held out of train. For SVHN both are known from the code, and are set in the preset.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from dcgan.config import Evaluate
from dcgan.evaluate.inputs import Labelled, check, check_classes, draw, labelled, split_for_choice
from dcgan.evaluate.newton import minimise
from dcgan.evaluate.products import products, scores
from dcgan.evaluate.samples import Samples, device

TOLERANCE = 1e-3  # of the objective, bounded or estimated by `minimise`; on digits the distance was at most 6e-5
CHOICE_DRAWS = 10  # on which C is chosen; the SVHN code's number


class L2SVM(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """One-vs-rest linear SVM with squared hinge loss: the objective of scikit-learn's `LinearSVC`.

    For each class, with y = +1 for its samples and -1 for the others, minimises

        0.5 * (|w|^2 + b^2) + C * sum_i max(0, 1 - y_i (w x_i + b))^2

    (the bias is the weight of a constant feature 1 and regularised like the others) to within `tol` of the objective.
    Two classes have one such problem, that of the second. Computes in float32 on `device` (auto: CUDA where there is
    one). x may be `Samples`, which are scaled as they are read, or an array, which is used unscaled.

    Learned: `classes_` (K,), `coef_` float32 (K, F), `intercept_` float32 (K,), `objective_` float64 (K,); (1, F) and
    (1,) for two classes.
    """

    def __init__(self, C: float = 1.0, tol: float = TOLERANCE, device: str = "auto") -> None:  # noqa: N803
        self.C = C
        self.tol = tol
        self.device = device

    def fit(self, x: Samples | np.ndarray, y: np.ndarray) -> Self:
        """Learn from x (N, F) and labels y (N,).

        Raises ValueError if y has one class, x a NaN or C is not above 0, NotConvergedError if float32 does not reach
        `tol` (C far too large).
        """
        if isinstance(x, Samples):
            samples = x
        else:
            array, y = validate_data(self, x, y, dtype=np.float32, order="C")
            check_classification_targets(y)
            samples = Samples.of(array, device(self.device))
        (model,) = fit_all(samples, y, [self.C], self.tol)
        self.__dict__.update({name: value for name, value in vars(model).items() if name.endswith("_")})
        return self

    def decision_function(self, x: Samples | np.ndarray) -> np.ndarray:
        """Each class's w x + b, float32 (N, K); with two classes only that of the second, (N,)."""
        check_is_fitted(self)
        if isinstance(x, Samples):
            samples = x
        else:
            array = validate_data(self, x, dtype=np.float32, order="C", reset=False)
            samples = Samples.of(array, device(self.device))
        found = scores(samples, self._weights().to(samples.device)).T.cpu().numpy()
        return found if len(self.classes_) > 2 else found[:, 0]

    def predict(self, x: Samples | np.ndarray) -> np.ndarray:
        """The class with the highest score, (N,)."""
        return _predicted(self.decision_function(x), self.classes_)

    def _weights(self) -> torch.Tensor:
        return torch.from_numpy(np.column_stack([self.coef_, self.intercept_]))


def fit_all(x: Samples, y: np.ndarray, grid: Sequence[float], tol: float = TOLERANCE) -> list[L2SVM]:
    """A fitted SVM for each C, smallest first, each from the one before; all classes in the same passes over x.

    Raises as `L2SVM.fit` does.
    """
    for c in grid:
        if not 0 < c < np.inf:
            raise ValueError(f"C={c}: a penalty is above 0, and finite")
    classes = np.unique(y)
    if len(classes) < 2:
        raise ValueError(f"train has one class only, {classes[0]}: there is nothing to tell apart")
    positive = classes[1:] if len(classes) == 2 else classes
    signs = torch.from_numpy(np.where(y == positive[:, None], 1, -1).astype(np.float32)).to(x.device)
    form = products(x)
    models, start = [], None
    for c in sorted(set(grid)):  # each starts from the one before: the larger, the harder
        penalties = torch.full((len(positive), 1), c, device=x.device)
        weights, found, objective = minimise(form, signs, penalties, tol, start)
        start = weights, found
        own = form.original(weights).cpu().numpy()
        model = L2SVM(C=c, tol=tol)
        model.classes_, model.objective_, model.n_features_in_ = classes, objective, x.width
        model.coef_, model.intercept_ = own[:, :-1].copy(), own[:, -1].copy()
        models.append(model)
    return models


def _predicted(found: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return classes[found.argmax(1) if found.ndim == 2 else (found > 0).astype(int)]


def score(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    settings: Evaluate,
    validation: Labelled | None = None,
) -> dict[str, float]:
    """`svm/accuracy` on test (0 to 1, higher is better), `svm/c`, the C that was chosen, and `svm/validation_accuracy`.

    x: float16 or float32 (N, F), y: int64 (N,). `settings.labels` random labels are used, the classes in proportion
    (0: all). The C of `settings.c_grid` with the highest accuracy on `validation`, the smaller of equal ones, is
    chosen; without `validation` a fifth of the labels is held out for that, and all are then fitted with the chosen C.
    Test is scored once. Raises ValueError for input that `inputs` rejects.
    """
    check(train_x, train_y, test_x, test_y, validation)
    check_classes(train_y, test_y)
    rows = labelled(train_y, settings.labels, settings.seed)
    samples, labels = _scaled(train_x, settings), train_y[rows]
    train = samples.take(rows)
    fit, held, held_y = split_for_choice(train, labels, validation, settings.seed)
    models = fit_all(train.take(fit), labels[fit], settings.c_grid)
    accuracies = _accuracies(models, held, held_y)
    chosen = models[int(np.argmax(accuracies))]
    if not validation:
        chosen = L2SVM(C=chosen.C).fit(train, labels)
    return {
        "svm/accuracy": float((chosen.predict(samples.like(test_x)) == test_y).mean()),
        "svm/validation_accuracy": float(accuracies.max()),
        "svm/c": chosen.C,
    }


def score_few_labels(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    settings: Evaluate,
    validation: Labelled | None = None,
) -> dict[str, float]:
    """`svm_few_labels/accuracy` (higher is better), its `_std` over draws, `/validation_accuracy` and the chosen `/c`.

    The protocol of the paper's SVHN code. x: float16 or float32 (N, F), y: int64 (N,). `settings.labels_per_class`
    random labels of each class are drawn from train. An SVM is fitted to each of the first CHOICE_DRAWS draws for each
    C; the C with the highest mean accuracy on `validation`, the smaller of equal ones, is chosen. SVMs with that C,
    fitted to all `settings.draws` draws, are scored on test: mean, and standard deviation with divisor draws - 1; the
    published interval is 1.96 of these. Without `validation`, a fifth of train is held out for it and not drawn from.
    Raises ValueError for input that `inputs` rejects, also where a class has too few labels to draw.
    """
    check(train_x, train_y, test_x, test_y, validation)
    check_classes(train_y, test_y)
    samples = _scaled(train_x, settings)
    pool, held, held_y = split_for_choice(samples, train_y, validation, settings.seed)
    draws = [pool[draw(train_y[pool], settings.labels_per_class, (settings.seed, i))] for i in range(settings.draws)]
    paths = [fit_all(samples.take(rows), train_y[rows], settings.c_grid) for rows in draws[:CHOICE_DRAWS]]
    by_c = [list(models) for models in zip(*paths, strict=True)]
    means = [_accuracies(models, held, held_y).mean() for models in by_c]
    chosen = by_c[int(np.argmax(means))]
    chosen += [L2SVM(C=chosen[0].C).fit(samples.take(rows), train_y[rows]) for rows in draws[CHOICE_DRAWS:]]
    accuracies = _accuracies(chosen, samples.like(test_x), test_y)
    return {
        "svm_few_labels/accuracy": float(accuracies.mean()),
        "svm_few_labels/accuracy_std": float(accuracies.std(ddof=1)),
        "svm_few_labels/validation_accuracy": float(max(means)),
        "svm_few_labels/c": chosen[0].C,
    }


def _scaled(features: np.ndarray, settings: Evaluate) -> Samples:
    """Standardised with statistics of all of train, which use no labels, or unscaled."""
    return (Samples.standardised if settings.standardise else Samples.of)(features, device())


def _accuracies(models: Sequence[L2SVM], x: Samples, y: np.ndarray) -> np.ndarray:
    """(len(models),): each model's share of correct predictions, in one pass over the features."""
    found = scores(x, torch.cat([model._weights() for model in models]).to(x.device)).cpu().numpy()
    return np.array(
        [
            (_predicted(own.T if len(own) > 1 else own[0], model.classes_) == y).mean()
            for model, own in zip(models, np.split(found, len(models)), strict=True)
        ]
    )
