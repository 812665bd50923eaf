"""Minimises many L2-SVM objectives on the same samples by generalised Newton steps with conjugate gradients.

Keerthi and DeCoste, "A modified finite Newton method for fast solution of large scale linear SVMs" (2005), for all
classes and penalties together, so that they share every pass over the features. Memory beyond the features: a few
arrays (M, N + F) for M problems, and what `products` takes.
"""

import numpy as np
import torch
from torch import Tensor

from dcgan.evaluate.products import Reduced, Streamed
from dcgan.evaluate.samples import NotConvergedError

NEWTON_STEPS = 100  # 2 to 8 are needed on standardised features
CG_STEPS = 250  # in one Newton step; 5 to 60 are needed
CG_RESIDUAL = 0.1  # of the gradient's norm, at which a Newton step is good enough; liblinear's value
CONFIRMING = 0.01  # of the step whose small gain ends the search: a looser one was seen to gain a 20th of what was left
CAUTION = 10  # times that gain is assumed to be still possible
SEARCH_STEPS = 20  # of a bracketed Newton search along a line, over scores alone

Products = Streamed | Reduced


def minimise(
    x: Products, signs: Tensor, c: Tensor, tol: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Weights (M, width), their scores (M, N) and objectives float64 (M,) of M independent problems.

    Each minimises 0.5 |w|^2 + c sum_i max(0, 1 - sign_i w.x_i)^2. signs: +1 or -1, (M, N). c: (M, 1), so that classes
    and penalties may be mixed. start: weights and scores to start from; both are overwritten.

    A problem is done when half its squared gradient, which bounds the distance to the minimum since the objective is
    1-strongly convex, is at most `tol` of the objective, or when a step, and then one with tighter conjugate gradients,
    is predicted to gain at most a tenth of that. Raises NotConvergedError, naming problem and bound, if float32 does
    not get there.
    """
    weights, found = start or (torch.zeros(len(signs), x.width, device=x.device), torch.zeros_like(signs))
    gain = torch.full((len(signs), 1), torch.inf, dtype=torch.float64, device=x.device)
    residual = torch.full_like(c, CG_RESIDUAL)
    for _ in range(NEWTON_STEPS):
        slack = (1 - signs * found).clamp_(min=0)
        # In float64: in float32 50,000 terms lose digits that decide when to stop.
        objective = 0.5 * _squares(weights.double()) + c.double() * _squares(slack.double())
        gradient = weights - 2 * c * x.transposed(signs * slack)
        bound = 0.5 * _squares(gradient.double()) / objective
        expected = torch.where(gain > 0, CAUTION * gain / objective, torch.inf)  # no gain: the step has overflowed
        left = torch.where(residual == CONFIRMING, torch.minimum(bound, expected), bound).squeeze(1)
        open_ = (~(left <= tol)).nonzero().squeeze(1)  # also NaN
        if not len(open_):
            return weights, found, objective.squeeze(1).cpu().numpy()
        residual = torch.where(expected <= tol, CONFIRMING, CG_RESIDUAL)
        step, change = _newton_step(x, gradient[open_], (slack[open_] > 0).float(), c[open_], residual[open_])
        length = _search(weights[open_], step, signs[open_], found[open_], change, c[open_])
        gain[open_] = -0.5 * (gradient[open_].double() * step.double()).sum(1, keepdim=True)
        weights[open_] += length * step
        found[open_] += length * change
    worst = int(left.argmax())
    raise NotConvergedError(
        f"L2-SVM {worst} with C={float(c[worst]):g} is within {left[worst]:.1e} of its minimum, not {tol:g}, after "
        f"{NEWTON_STEPS} Newton steps: standardise the features or lower C"
    )


def _newton_step(x: Products, gradient: Tensor, inside: Tensor, c: Tensor, enough: Tensor) -> tuple[Tensor, Tensor]:
    """The step (M, width) to the minimum if the same images stay inside the margin, and what it adds to scores.

    enough: (M, 1), the share of the gradient's norm that may be left at the end of the step.
    """
    step, change, residual = torch.zeros_like(gradient), torch.zeros_like(inside), -gradient
    strength = 2 * c * inside.sum(1, keepdim=True)
    direction = x.precondition(residual, strength)
    size = (residual * direction).sum(1, keepdim=True)
    smallest = enough**2 * size
    going = size > smallest
    for _ in range(CG_STEPS):
        curvature, found = x.curvature(direction, inside)
        curvature = direction + 2 * c * curvature
        length = torch.where(going, size / (direction * curvature).sum(1, keepdim=True), 0)
        step += length * direction
        change += length * found
        residual -= length * curvature
        solved = x.precondition(residual, strength)
        previous, size = size, (residual * solved).sum(1, keepdim=True)
        going = size > smallest
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


def _squares(values: Tensor) -> Tensor:
    return values.square().sum(1, keepdim=True)
