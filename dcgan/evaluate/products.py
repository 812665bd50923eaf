"""The matrix products with the features that the SVM's Newton steps need, in the two forms that are fast.

`Streamed` reads the features a block at a time; `Reduced` serves few samples of many features and never reads them
again. Weights are float32 (M, width), for M problems side by side; values and scores are float32 (M, N).
"""

import numpy as np
import torch
from torch import Tensor

from dcgan.evaluate.samples import Samples

REDUCED_ROWS = 2560  # the most rows whose decomposition (its time grows with their cube) costs less than the passes
# Of the preconditioner: more rows save passes over the features, at a cost that grows with their square. On 4,000 x
# 7,168 features and the default grid of C, 256 rows take 1,485 passes and 1,000 take 626; on 10,000 and C = 1e-4, 256
# and 512 rows take 30 and 18.
SKETCH_ROWS = 512
SHARE = 8  # the preconditioner takes at most 1 / SHARE of the features' own memory
SMALL = 2**25  # bytes that it may take in any case
MEASURED = 8  # samples per direction on which its curvature is measured
COLUMNS = 1024  # features per part where all rows are needed at once
# Below this share of the largest, an eigenvalue of products in float32 is only rounding error.
NOISE = 1e-7
ROUNDING = 1e-10  # the same of products in float64; below it float32 does not tell a direction from the others


def products(x: Samples) -> "Streamed | Reduced":
    """The faster form for these samples."""
    return Reduced(x) if len(x) <= min(REDUCED_ROWS, x.width // 2) else Streamed(x)


class Streamed:
    """Products with samples (N, F) and their constant feature 1, a block of rows at a time: width is F + 1."""

    def __init__(self, x: Samples) -> None:
        self.x, self.width, self.device = x, x.width + 1, x.device
        self.basis, self.spectrum = _sketch(x)

    def transposed(self, values: Tensor) -> Tensor:
        """(M, width): values times the samples."""
        total = torch.empty(len(values), self.width, device=self.device)
        total[:, :-1] = transposed(self.x, values)
        total[:, -1] = values.sum(1)
        return total

    def curvature(self, weights: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """`transposed` of the scores of images inside the margin, and all scores, in one pass over the features."""
        return curvature(self.x, weights, inside)

    def precondition(self, vectors: Tensor, strength: Tensor) -> Tensor:
        """Vectors times an approximate inverse of I + strength (M, 1) times the samples' mean curvature."""
        curvature = strength * self.spectrum
        # Never quite 1: the basis is orthonormal to float32 only, and the inverse must stay positive.
        share = (curvature / (1 + curvature)).clamp_(max=1 - 1e-5)
        return vectors - (vectors @ self.basis.T * share) @ self.basis

    def original(self, weights: Tensor) -> Tensor:
        """The weights of the features and, last, of the constant one: (M, F + 1)."""
        return weights


class Reduced:
    """Products in the span of the samples (N, F), in which the minimum lies: width is at most N.

    If the samples' inner products are V S V', constant feature included, the rows of V sqrt(S) have the same ones. So
    the same objective is minimised over them, and the curvature of all samples is diagonal there.
    """

    def __init__(self, x: Samples) -> None:
        self.x, self.device = x, x.device
        products = torch.ones(len(x), len(x), dtype=torch.float64, device=x.device)  # of the constant feature
        for _, part in x.parts(COLUMNS):
            exact = part.double()  # in float32, a mean of 1,000 deviations would hide what is beside it
            products.addmm_(exact, exact.T)
        spectrum, vectors = torch.linalg.eigh(products)
        kept = spectrum > ROUNDING * spectrum[-1]
        spectrum, vectors = spectrum[kept], vectors[:, kept]
        self.width, self.spectrum = len(spectrum), (spectrum / len(x)).float()
        self.rows, self.back = (vectors * spectrum.sqrt()).float(), vectors / spectrum.sqrt()

    def transposed(self, values: Tensor) -> Tensor:
        """As in `Streamed`."""
        return values @ self.rows

    def curvature(self, weights: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Streamed`."""
        found = weights @ self.rows.T
        return (found * inside) @ self.rows, found

    def precondition(self, vectors: Tensor, strength: Tensor) -> Tensor:
        """As in `Streamed`."""
        return vectors / (1 + strength * self.spectrum)

    def original(self, weights: Tensor) -> Tensor:
        """As in `Streamed`; summed in float64, since what samples have in common cancels out."""
        values = weights.double() @ self.back.T
        total = torch.zeros(len(values), self.x.width + 1, dtype=torch.float64, device=self.device)
        for where, block in self.x.blocks():
            total[:, :-1].addmm_(values[:, where], block.double())
        total[:, -1] = values.sum(1)
        return total.float()


def scores(x: Samples, weights: Tensor) -> Tensor:
    """float32 (M, N): each of the weights (M, F + 1), the last one the bias, on each sample."""
    found = torch.empty(len(weights), len(x), device=x.device)
    for where, block in x.blocks():
        found[:, where] = _score(weights, block)
    return found


def curvature(x: Samples, weights: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """`inside` * scores times the samples with their constant feature, (M, F + 1), and the weights' scores (M, N)."""
    total, found = torch.zeros_like(weights), torch.empty_like(inside)
    for where, block in x.blocks():
        found[:, where] = _score(weights, block)
        total[:, :-1].addmm_(found[:, where] * inside[:, where], block)
    total[:, -1] = (found * inside).sum(1)
    return total, found


def transposed(x: Samples, values: Tensor) -> Tensor:
    """float32 (M, F): values (M, N) times the samples, without their constant feature."""
    total = torch.zeros(len(values), x.width, device=x.device)
    for where, block in x.blocks():
        total.addmm_(values[:, where], block)
    return total


def _score(weights: Tensor, block: Tensor) -> Tensor:
    return torch.addmm(weights[:, -1:], weights[:, :-1], block.T)


def _sketch(x: Samples) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (m, F + 1) near the directions of largest curvature, and mean curvatures (m,) along it.

    The span of random samples, turned towards the largest curvatures by one subspace iteration (Halko, Martinsson and
    Tropp, 2011, section 4.5), in which the curvature is diagonal (Rayleigh-Ritz).
    """
    limit = max(x.features.nbytes // SHARE, SMALL) // (4 * x.width)
    size = max(1, min(SKETCH_ROWS, len(x) // 4, limit))
    order = np.random.default_rng(0).permutation(len(x))  # affects the speed, not the minimum
    basis = torch.ones(size, x.width + 1, device=x.device)
    for where, block in x.take(np.sort(order[:size])).blocks():
        basis[where, :-1] = block
    # Other samples are used too: along a direction that m samples span, their own curvature is too large.
    seen = x.take(np.sort(order[: MEASURED * size]))
    basis = _orthonormal(basis)
    turned = torch.zeros_like(basis)
    for _, block in seen.blocks():
        found = _score(basis, block)
        turned[:, :-1].addmm_(found, block)
        turned[:, -1] += found.sum(1)
    basis = _orthonormal(turned)
    products = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=x.device)
    for _, block in seen.blocks():
        found = _score(basis, block)
        products += found @ found.T
    spectrum, vectors = torch.linalg.eigh(products)
    return _turn(basis, vectors), (spectrum.clamp(min=0) / len(seen)).float()


def _orthonormal(basis: Tensor) -> Tensor:
    """An orthonormal basis of the same span, in the same memory, without directions that are rounding error."""
    products = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=basis.device)
    for part in basis.split(COLUMNS, 1):
        products += part @ part.T
    spectrum, vectors = torch.linalg.eigh(products)
    kept = spectrum > NOISE * spectrum[-1]
    return _turn(basis, vectors[:, kept] / spectrum[kept].sqrt())


def _turn(basis: Tensor, vectors: Tensor) -> Tensor:
    """`vectors` (m, k) transposed times the basis (m, F + 1), in the basis's memory."""
    for part in basis.split(COLUMNS, 1):
        part[: vectors.shape[1]] = (vectors.T @ part.double()).float()
    return basis[: vectors.shape[1]]
