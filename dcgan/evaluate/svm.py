"""L2-SVM on features: accuracy with all labels, and with few labels a class over random draws.

The classifier of the paper (section 5), "a regularized linear L2-SVM on top of" the discriminator's features. The
paper published no grid for C and no scaling; here features are standardised with the mean and standard deviation of
all training images (which takes none of their labels) and C is chosen on a held-out fifth of train.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dcgan.config import Evaluate
from dcgan.evaluate import samples
from dcgan.evaluate.samples import Samples

NEWTON_STEPS = 100  # 5 to 15 suffice on standardised features
CG_STEPS = 250  # in one Newton step; about 10 to 60 suffice


class L2SVM:
    """One-vs-rest linear SVM with squared hinge loss, as scikit-learn's `LinearSVC` defines it.

    For each class, with y = +1 for its images and -1 for the others, minimises

        0.5 * (|w|^2 + b^2) + C * sum_i max(0, 1 - y_i (w x_i + b))^2

    (the bias is one more weight, on a constant feature 1, and regularised like the others). Generalised Newton method
    (Keerthi and DeCoste, 2005): conjugate gradients solve each step on the images inside the margin, all classes share
    every pass over the features. The objective is 1-strongly convex, so half the squared gradient bounds the distance
    to the minimum: `fit` stops where that is below `tol` times the objective, for each class.

    Learned: `classes_` (K,), `coef_` float32 (K, F), `intercept_` (K,), `objective_` float64 (K,).
    """

    def __init__(self, C: float = 1.0, tol: float = 1e-4) -> None:  # noqa: N803
        self.C = C
        self.tol = tol

    def fit(self, x: Samples | np.ndarray, y: np.ndarray, start: "L2SVM | None" = None) -> "L2SVM":
        """Learn from x (N, F) and labels y (N,), beginning at the weights of `start`, fitted to the same classes.

        Raises ValueError if y has one class, RuntimeError if the bound is not met, naming the class and the bound.
        """
        x = x if isinstance(x, Samples) else Samples.of(x)
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(f"one class only, {self.classes_}: there is nothing to tell apart")
        signs = torch.from_numpy(np.where(y == self.classes_[:, None], 1, -1).astype(np.float32))
        weights = torch.zeros(len(signs), x.width + 1) if start is None else start.weights_
        self.weights_, self.objective_ = minimise(x, signs, torch.full((len(signs), 1), self.C), weights, self.tol)
        self.coef_ = self.weights_[:, :-1].numpy()
        self.intercept_ = self.weights_[:, -1].numpy()
        return self

    def decision_function(self, x: Samples | np.ndarray) -> np.ndarray:
        """Each class's score w x + b, float32 (N, K)."""
        return scores(x if isinstance(x, Samples) else Samples.of(x), self.weights_).T.numpy()

    def predict(self, x: Samples | np.ndarray) -> np.ndarray:
        """The class with the highest score, (N,)."""
        return self.classes_[self.decision_function(x).argmax(1)]


def scores(x: Samples, weights: torch.Tensor) -> torch.Tensor:
    """float32 (M, N): each of the weights (M, F + 1), the last column the bias, on each sample."""
    found = torch.empty(len(weights), len(x))
    for where, block in x.blocks():
        found[:, where] = weights[:, :-1] @ block.T + weights[:, -1:]
    return found


def _transposed(x: Samples, values: torch.Tensor) -> torch.Tensor:
    """(M, F + 1): values (M, N) times the samples with their constant feature."""
    total = torch.zeros(len(values), x.width + 1)
    for where, block in x.blocks():
        total[:, :-1].addmm_(values[:, where], block)
    total[:, -1] = values.sum(1)
    return total


def _curvature(x: Samples, weights: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_transposed` of the scores of images inside the margin, and all scores, in one pass over the features."""
    total, found = torch.zeros_like(weights), torch.empty(inside.shape)
    for where, block in x.blocks():
        found[:, where] = weights[:, :-1] @ block.T + weights[:, -1:]
        total[:, :-1].addmm_(found[:, where] * inside[:, where], block)
    total[:, -1] = (found * inside).sum(1)
    return total, found


def minimise(
    x: Samples, signs: torch.Tensor, c: torch.Tensor, weights: torch.Tensor, tol: float
) -> tuple[torch.Tensor, np.ndarray]:
    """Weights (M, F + 1) and objectives float64 (M,) of M independent problems on the same samples.

    signs: +1 or -1, (M, N). c: the penalty of each problem, (M, 1), so that classes and penalties may be mixed.
    weights: where to begin. Raises RuntimeError if a problem is not within `tol` of its minimum, relatively.
    """
    weights = weights.clone()
    found = scores(x, weights)
    for _ in range(NEWTON_STEPS):
        slack = (1 - signs * found).clamp_(min=0)
        objective = _objective(weights, slack, c)
        gradient = weights - 2 * c * _transposed(x, signs * slack)
        bound = 0.5 * gradient.double().square().sum(1) / objective
        todo = (bound > tol).nonzero().squeeze(1)
        if not len(todo):
            return weights, objective.numpy()
        step, change = _newton_step(x, gradient[todo], slack[todo] > 0, c[todo])
        length = _line_search(weights[todo], step, signs[todo], found[todo], change, c[todo])
        weights[todo] += length * step
        found[todo] += length * change
    worst = int(bound.argmax())
    raise RuntimeError(
        f"the L2-SVM of class {worst} at C={float(c[worst]):g} is {bound[worst]:.1e} from its minimum, not {tol:.0e}: "
        "standardise the features or lower C"
    )


def _objective(weights: torch.Tensor, slack: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """float64 (M,); sums over 50,000 images lose too many digits in float32 for a line search."""
    return 0.5 * weights.double().square().sum(1) + c.double().squeeze(1) * slack.double().square().sum(1)


def _newton_step(
    x: Samples, gradient: torch.Tensor, inside: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step (M, F + 1) to the minimum were the same images to stay inside the margin, and its scores (M, N)."""
    inside = inside.float()
    step, change = torch.zeros_like(gradient), torch.zeros_like(inside)
    residual = -gradient
    direction = residual.clone()
    squared = residual.square().sum(1, keepdim=True)
    enough = CG_RESIDUAL**2 * squared
    for _ in range(CG_STEPS):
        curvature, found = _curvature(x, direction, inside)
        curvature = direction + 2 * c * curvature
        going = squared > enough
        length = torch.where(going, squared / (direction * curvature).sum(1, keepdim=True), 0)
        step += length * direction
        change += length * found
        residual -= length * curvature
        previous, squared = squared, residual.square().sum(1, keepdim=True)
        if (squared <= enough).all():
            break
        direction = residual + squared / previous * direction
    return step, change
