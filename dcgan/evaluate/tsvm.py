"""Transductive SVM: a linear L2-SVM that also keeps unlabelled images away from its boundaries.

The baseline of the paper's SVHN table: 66.55 % error with 1,000 labels on pixels, a figure of Kingma et al. (NeurIPS
2014). This is not their program: TSVMs of that time switched hard labels (Joachims, "Transductive inference for text
classification", 1999) and had kernels, so the figures may be compared but need not agree. Here: the smooth loss of
Chapelle and Zien ("Semi-supervised classification by low density separation", 2005), minimised by L-BFGS as in Gieseke
et al. ("Sparse quasi-Newton optimization for semi-supervised support vector machines", 2012), all classes at once.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data
from torch import Tensor

from dcgan.config import Evaluate
from dcgan.evaluate.inputs import Labelled, check, check_classes, draw, split_for_choice
from dcgan.evaluate.samples import NotConvergedError, Samples, device
from dcgan.evaluate.svm import L2SVM

UNLABELLED = -1  # scikit-learn's label of a row that has none
SHARPNESS = 3.0  # of the loss exp(-3 f^2), near max(0, 1 - |f|)^2; Chapelle and Zien's
ANNEALED = (0.0, 1e-6, 1e-4, 0.01, 0.1, 0.5, 1.0)  # weights of the unlabelled, in turn: Gieseke et al.'s program's
TRIED = (0.01, 0.1, 0.5, 1.0)  # of those, the ones that `score` chooses among: with less, the unlabelled change nothing
TOLERANCE = 1e-6  # of the objective, in one step of L-BFGS
RESOLVED = 1e-12  # of an objective near 1: what a line search in float64 can resolve for certain
ITERATIONS = 2000  # of L-BFGS in one stage; 5 to 250 are needed on standardised pixels
# Of the change of variables that makes the problem well-conditioned. On 800 images of SVHN (160 labelled) and C = 0.1:
# 581 evaluations with it and 2,647 without.
SKETCH_ROWS = 1024
SCALE = 2.0**20  # SciPy compares what a step gains with the objective, but with 1 where that is less
NOISE = 1e-10  # of the largest eigenvalue; below it an eigenvector is rounding error


class TSVM(L2SVM):
    """One-vs-rest linear transductive SVM (S3VM); `predict` and `decision_function` also serve new images.

    For each class, with y = +1 for its samples and -1 for the others among l labelled ones, looks for a minimum of

        0.5 * |w|^2 + C * (sum_labelled max(0, 1 - y_i f(x_i))^2 + unlabelled * l * mean_unlabelled exp(-3 f(x_j)^2))

    over f(x) = w x + b whose mean over the unlabelled samples is the mean of y over the labelled ones, the class's
    share in [-1, 1]: without this balance all unlabelled samples may end up on one side. At `unlabelled` = 1 all
    unlabelled samples together weigh as much as all labelled ones. Not convex: `unlabelled` grows from 0 through
    ANNEALED, each stage starts from the one before, and each ends where a step of L-BFGS gains less than `tol` of the
    objective. Where nothing is unlabelled the balance is over the labelled samples. Two classes have one such problem,
    that of the second. Computes in float64, which line searches near a minimum need, on `device` (auto: CUDA where
    there is one) and in blocks of rows: memory beyond x is about 25 KiB per feature. x may be `Samples`, which are
    scaled as they are read, or an array, which is used unscaled.

    Learned: `classes_` (K,), `coef_` float32 (K, F), `intercept_` float32 (K,), `objective_` float64 (K,); (1, F) and
    (1,) for two classes.
    """

    def __init__(
        self,
        C: float = 1.0,  # noqa: N803
        unlabelled: float = 1.0,
        tol: float = TOLERANCE,
        device: str = "auto",
    ) -> None:
        super().__init__(C, tol, device)
        self.unlabelled = unlabelled

    def fit(self, x: Samples | np.ndarray, y: np.ndarray) -> Self:
        """Learn from x (N, F) and labels y (N,), -1 where a row has none.

        Raises ValueError for C or `unlabelled` that are not positive, labels of one class or a NaN in x;
        NotConvergedError if L-BFGS does not reach `tol` (C far too large).
        """
        if not isinstance(x, Samples):
            array, y = validate_data(self, x, y, dtype=np.float32, order="C")
            check_classification_targets(y)
            x = Samples.of(array, device(self.device))
        *_, model = anneal(x, y, self.C, self.unlabelled, self.tol)
        self.__dict__.update({name: value for name, value in vars(model).items() if name.endswith("_")})
        return self


def anneal(x: Samples, y: np.ndarray, c: float, unlabelled: float, tol: float = TOLERANCE) -> Iterator[TSVM]:
    """The fitted TSVM of each stage: for the weights in ANNEALED below `unlabelled`, then for `unlabelled`.

    Each equals what `fit` finds for its weight, so all of them cost no more than the last. Raises as `TSVM.fit` does.
    """
    if not (0 < c < np.inf and 0 < unlabelled < np.inf):
        raise ValueError(f"C={c} and unlabelled={unlabelled}, but both must be positive and finite")
    known, other = np.flatnonzero(y != UNLABELLED), np.flatnonzero(y == UNLABELLED)
    classes = np.unique(y[known])
    if len(classes) < 2:
        raise ValueError(f"train has labels of {len(classes)} class, {classes}: there is nothing to tell apart")
    positive = classes[1:] if len(classes) == 2 else classes
    signs = torch.from_numpy(np.where(y[known] == positive[:, None], 1.0, -1.0)).to(x.device)
    mean = _mean(x.take(other if len(other) else known))
    # Measured from that mean, w x is 0 on average whatever w is: the balance holds if the intercept is the share.
    centred = replace(x, mean=x.mean + mean / x.inverse_scale)
    problem = _Problem(centred.take(known), centred.take(other), signs, 1 / (c * len(known)))
    weights = torch.zeros(len(positive), x.width, dtype=torch.float64, device=x.device)
    for stage in [weight for weight in ANNEALED if weight < unlabelled] + [unlabelled]:
        weights, objectives = problem.minimise(weights, stage, tol)
        model = TSVM(c, stage, tol)
        model.classes_, model.objective_, model.n_features_in_ = classes, objectives * c * len(known), x.width
        model.coef_ = weights.float().cpu().numpy()
        model.intercept_ = (problem.share[:, 0] - weights @ mean.double()).float().cpu().numpy()
        yield model


class _Problem:
    """The classes' objectives divided by C l, which is Gieseke et al.'s form: about 1 where the weights are 0.

    known (l, F), other (u, F): measured from the mean at which the balance holds. signs: +1 or -1, float64 (K, l).
    decay: 1 / (C l).
    """

    def __init__(self, known: Samples, other: Samples, signs: Tensor, decay: float) -> None:
        self.known, self.other, self.signs, self.decay = known, other, signs, decay
        self.share = signs.mean(1, keepdim=True)
        rows = np.random.default_rng(0).permutation(len(known))[:SKETCH_ROWS]  # affects the speed, not the minimum
        sketch = torch.cat([block.double() for _, block in known.take(rows).blocks()])
        spectrum, vectors = torch.linalg.eigh(sketch @ sketch.T)
        kept = spectrum > NOISE * spectrum[-1]
        self.basis = (vectors[:, kept] / spectrum[kept].sqrt()).T @ sketch
        self.curvature = spectrum[kept] / len(rows)

    def minimise(self, begin: Tensor, unlabelled: float, tol: float) -> tuple[Tensor, np.ndarray]:
        """The weights float64 (K, F) of a minimum near `begin`, and each class's objective there."""
        # As if all known were inside the margin, and the others curved like them.
        shrink = (1 + 2 * (1 + unlabelled) * self.curvature / self.decay).rsqrt() - 1

        def turned(vectors: Tensor) -> Tensor:
            return vectors + (vectors @ self.basis.T * shrink) @ self.basis

        def reached(flat: np.ndarray) -> Tensor:
            return begin + turned(torch.from_numpy(flat).to(begin.device).view(begin.shape))

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            values, gradient = self.at(reached(flat), unlabelled)
            return SCALE * float(values.sum()), SCALE * turned(gradient).cpu().numpy().ravel()

        # The curvature in these variables is the decay or more, so a step gains at most |gradient|^2 / (2 decay).
        bounds = {"ftol": tol, "gtol": SCALE * (2 * self.decay * RESOLVED / begin.numel()) ** 0.5}
        options = bounds | {"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS}
        found = minimize(objective, np.zeros(begin.numel()), method="L-BFGS-B", jac=True, options=options)
        if not found.success:
            raise NotConvergedError(
                f"TSVM with C={1 / (self.decay * len(self.known)):g} and unlabelled={unlabelled:g} has not come within "
                f"tol={tol:g} after {found.nit} steps of L-BFGS ({found.message}): standardise the features or lower C"
            )
        weights = reached(found.x)
        return weights, self.at(weights, unlabelled)[0].cpu().numpy()

    def at(self, weights: Tensor, unlabelled: float) -> tuple[Tensor, Tensor]:
        """Each class's objective, float64 (K,), and their gradient, float64 (K, F), at weights float64 (K, F)."""
        values, gradient = self.decay / 2 * weights.square().sum(1), self.decay * weights
        for where, block in self.known.blocks():
            signs, block = self.signs[:, where], block.double()
            slack = (1 - signs * torch.addmm(self.share, weights, block.T)).clamp_(min=0)
            values += slack.square().sum(1) / len(self.known)
            gradient.addmm_(signs * slack, block, alpha=-2 / len(self.known))
        for _, block in self.other.blocks() if unlabelled else ():
            block = block.double()
            found = torch.addmm(self.share, weights, block.T)
            loss = (-SHARPNESS * found.square()).exp_()
            values += unlabelled / len(self.other) * loss.sum(1)
            gradient.addmm_(found.mul_(loss), block, alpha=-2 * SHARPNESS * unlabelled / len(self.other))
        return values, gradient


def _mean(x: Samples) -> Tensor:
    """The mean of all samples, (F,)."""
    total = torch.zeros(x.width, dtype=torch.float64, device=x.device)
    for _, block in x.blocks():
        total += block.sum(0, dtype=torch.float64)
    return (total / len(x)).float()


def score(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    settings: Evaluate,
    validation: Labelled | None = None,
) -> dict[str, float]:
    """`tsvm/accuracy` (higher is better), its `_std` over draws, `/validation_accuracy` and chosen `/c`, `/unlabelled`.

    x: float16 or float32 (N, F), y: int64 (N,). As `svm.score_few_labels` and with its draws: from train,
    `settings.labels_per_class` random labels of each class are drawn, and its other images are unlabelled. Each feature
    is standardised over train, whatever `settings.standardise` says: the minimiser needs it. Test images are not among
    the unlabelled: Kingma et al. split the training images into labelled and unlabelled, and so the accuracy is of new
    images, like every other protocol's (in Joachims's transduction, 1999, the unlabelled images are those of test). On
    the first draw the C of `settings.c_grid` and the weight in TRIED with the highest accuracy on `validation`, the
    smaller of equal ones, are chosen for all draws. Without `validation`, a fifth of train is held out for it: neither
    drawn from nor unlabelled. Test is scored once per draw: mean, and standard deviation with divisor draws - 1.
    Raises ValueError for input that `inputs` rejects.
    """
    check(train_x, train_y, test_x, test_y, validation)
    check_classes(train_y, test_y)
    samples = Samples.standardised(train_x, device())
    pool, held, held_y = split_for_choice(samples, train_y, validation, settings.seed)
    train, test, per_class = samples.take(pool), samples.like(test_x), settings.labels_per_class
    draws = (draw(train_y[pool], per_class, (settings.seed, i)) for i in range(settings.draws))
    labels = [_partly(train_y[pool], rows) for rows in draws]
    best, reached = TSVM(), -1.0
    for c in sorted(settings.c_grid):
        for model in anneal(train, labels[0], c, max(TRIED)):
            accuracy = model.score(held, held_y) if model.unlabelled in TRIED else -1.0
            if accuracy > reached:
                best, reached = model, accuracy
    models = [best] + [TSVM(best.C, best.unlabelled).fit(train, y) for y in labels[1:]]
    accuracies = np.array([model.score(test, test_y) for model in models])
    return {
        "tsvm/accuracy": float(accuracies.mean()),
        "tsvm/accuracy_std": float(accuracies.std(ddof=1)),
        "tsvm/validation_accuracy": float(reached),
        "tsvm/c": best.C,
        "tsvm/unlabelled": best.unlabelled,
    }


def _partly(labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The labels (N,) of these rows, and -1 for all others."""
    partly = np.full_like(labels, UNLABELLED)
    partly[rows] = labels[rows]
    return partly
