"""The minimum of many L2-SVM objectives on the same samples: generalised Newton steps by conjugate gradients.

Keerthi and DeCoste, "A modified finite Newton method for fast solution of large scale linear SVMs" (2005), for all
classes together, so that they share every pass over the features. The cost is the passes: half a second of
one core each for 50,000 x 7,168, about ten of them for C = 1e-5 and over a hundred for 1e-3. Memory beyond the
features: a few (M, N + F), and the preconditioner's 16 KiB a feature.
"""

import numpy as np
import torch
from torch import Tensor

from dcgan.evaluate.samples import Samples

NEWTON_STEPS = 100  # 2 to 6 are needed on standardised features
CG_STEPS = 250  # in one Newton step; 5 to 60 are needed
CG_RESIDUAL = 0.1  # of the gradient's norm, where a Newton step is good enough; liblinear's value
# Of the preconditioner. On 20,000 x 2,000 features and the default grid of C: 185 passes with 2,000 rows, 319 with
# 1,000 and 638 without it.
SKETCH_ROWS = 2048
SEARCH_STEPS = 20  # of a bracketed Newton search along a line, over scores alone


def minimise(x: Samples, signs: Tensor, c: Tensor, weights: Tensor, tol: float) -> tuple[Tensor, np.ndarray]:
    """Weights (M, F + 1) and objectives float64 (M,) of M independent problems; the last weight is the bias.

    Each minimises 0.5 |w|^2 + c sum_i max(0, 1 - sign_i w.(x_i, 1))^2. signs: +1 or -1, (M, N). c: (M, 1), so that
    classes and penalties may be mixed. weights: where to begin. The objective is 1-strongly convex, so half the
    squared gradient bounds the distance to the minimum: done when that is at most `tol` of the objective, for each.
    Raises RuntimeError, naming problem and bound, if float32 does not get there.
    """
    weights, found = weights.clone(), scores(x, weights)
    sketch = _Sketch(x)
    for _ in range(NEWTON_STEPS):
        slack = (1 - signs * found).clamp_(min=0)
        # In float64: 50,000 terms lose digits that decide when to stop.
        objective = 0.5 * _squares(weights.double()) + c.double() * _squares(slack.double())
        gradient = weights - 2 * c * _transposed(x, signs * slack)
        bound = (0.5 * _squares(gradient.double()) / objective).squeeze(1)
        open_ = (bound > tol).nonzero().squeeze(1)
        if not len(open_):
            return weights, objective.squeeze(1).numpy()
        step, change = _newton_step(x, sketch, gradient[open_], (slack[open_] > 0).float(), c[open_])
        length = _search(weights[open_], step, signs[open_], found[open_], change, c[open_])
        weights[open_] += length * step
        found[open_] += length * change
    worst = int(bound.argmax())
    raise RuntimeError(
        f"L2-SVM {worst} with C={float(c[worst]):g} is within {bound[worst]:.1e} of its minimum, not {tol:g}, after "
        f"{NEWTON_STEPS} Newton steps: standardise the features or lower C"
    )


def scores(x: Samples, weights: Tensor) -> Tensor:
    """float32 (M, N): each of the weights (M, F + 1), the last one the bias, on each sample."""
    found = torch.empty(len(weights), len(x))
    for where, block in x.blocks():
        found[:, where] = weights[:, :-1] @ block.T + weights[:, -1:]
    return found


def _transposed(x: Samples, values: Tensor) -> Tensor:
    """(M, F + 1): values (M, N) times the samples with their constant feature."""
    total = torch.zeros(len(values), x.width + 1)
    for where, block in x.blocks():
        total[:, :-1].addmm_(values[:, where], block)
    total[:, -1] = values.sum(1)
    return total


def _curvature(x: Samples, weights: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """`_transposed` of the scores of images inside the margin, and all scores, in one pass over the features."""
    total, found = torch.zeros_like(weights), torch.empty_like(inside)
    for where, block in x.blocks():
        found[:, where] = weights[:, :-1] @ block.T + weights[:, -1:]
        total[:, :-1].addmm_(found[:, where] * inside[:, where], block)
    total[:, -1] = (found * inside).sum(1)
    return total, found


def _newton_step(x: Samples, sketch: "_Sketch", gradient: Tensor, inside: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The step (M, F + 1) to the minimum if the same images stay inside the margin, and what it adds to scores."""
    step, change, residual = torch.zeros_like(gradient), torch.zeros_like(inside), -gradient
    strength = 2 * c * inside.sum(1, keepdim=True)
    direction = sketch.solve(residual, strength)
    size = (residual * direction).sum(1, keepdim=True)
    enough = CG_RESIDUAL**2 * size
    going = size > enough
    for _ in range(CG_STEPS):
        curvature, found = _curvature(x, direction, inside)
        curvature = direction + 2 * c * curvature
        length = torch.where(going, size / (direction * curvature).sum(1, keepdim=True), 0)
        step += length * direction
        change += length * found
        residual -= length * curvature
        solved = sketch.solve(residual, strength)
        previous, size = size, (residual * solved).sum(1, keepdim=True)
        going = size > enough
        if not going.any():
            break
        direction = torch.where(going, solved + size / previous * direction, 0)
    return step, change


def _search(weights: Tensor, step: Tensor, signs: Tensor, found: Tensor, change: Tensor, c: Tensor) -> Tensor:
    """(M, 1): how far along each step its objective is lowest; piecewise quadratic, so its slope has one zero."""
    along, squared = (weights * step).sum(1, keepdim=True), _squares(step)
    length, low, high = torch.ones_like(c), torch.zeros_like(c), torch.full_like(c, 4.0)
    for _ in range(SEARCH_STEPS):
        slack = (1 - signs * (found + length * change)).clamp_(min=0)
        slope = along + length * squared - 2 * c * (slack * signs * change).sum(1, keepdim=True)
        bend = squared + 2 * c * _squares(change * (slack > 0))
        low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
        newton = length - slope / bend
        length = torch.where((low < newton) & (newton < high), newton, (low + high) / 2)
    return length


class _Sketch:
    """A preconditioner for every class and C: the curvature that random rows alone would give.

    With S the rows (m, F + 1) and S S' = V diag(spectrum) V', holds V' S, so that (I + a S'S)^-1 is two products.
    In float64: in float32 the inverse loses its sign where C times the largest curvature is over 1e5.
    """

    def __init__(self, x: Samples) -> None:
        size = min(SKETCH_ROWS, len(x))
        rows = np.sort(np.random.default_rng(0).permutation(len(x))[:size])  # decides the speed, not the minimum
        (_, chosen), *_ = x.take(rows).blocks(size)
        chosen = torch.cat([chosen, torch.ones(size, 1)], 1).double()
        spectrum, vectors = torch.linalg.eigh(chosen @ chosen.T)
        self.spectrum = spectrum.clamp(min=torch.finfo(spectrum.dtype).tiny)
        self.basis = vectors.T @ chosen

    def solve(self, vectors: Tensor, strength: Tensor) -> Tensor:
        """(M, F + 1): vectors times the inverse of I + strength (M, 1) times the rows' mean curvature."""
        weight = strength.double() / len(self.spectrum)
        vectors = vectors.double()
        inverse = vectors - (vectors @ self.basis.T * (weight / (1 + weight * self.spectrum))) @ self.basis
        return inverse.float()


def _squares(values: Tensor) -> Tensor:
    return values.square().sum(1, keepdim=True)
