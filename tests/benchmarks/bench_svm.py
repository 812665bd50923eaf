"""Our L2-SVM against scikit-learn's LinearSVC, at equal objective: python tests/benchmarks/bench_svm.py

Both solve the same ten classes in this one run, on features whose spectrum falls like those of a convolution net.
LinearSVC gets the loosest `tol` with which it comes within 1e-3 of the lowest objective found. Its float64 copy of
the features is made outside the measured time. `OMP_NUM_THREADS=1` leaves out what a second core gives us.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from dcgan.evaluate.svm import L2SVM

CLASSES = 10
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)  # LinearSVC's default is the last


def features(samples: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Standardised float32 (N, F) with variances falling as 1 / rank along random directions, and labels (N,)."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((samples, width), np.float32) / np.sqrt(np.arange(1, width + 1, dtype=np.float32))
    x = hidden @ rng.standard_normal((width, width), np.float32)
    x = (x - x.mean(0)) / x.std(0)
    wanted = hidden[:, :200] @ rng.standard_normal((200, CLASSES)) + rng.standard_normal((samples, CLASSES))
    return x, wanted.argmax(1)


def objective(weights: np.ndarray, biases: np.ndarray, x: np.ndarray, y: np.ndarray, c: float) -> float:
    """The sum of all classes' objectives, in float64, by the definition."""
    slack = np.maximum(0, 1 - np.where(y[:, None] == np.arange(CLASSES), 1, -1) * (x @ weights.T + biases))
    return 0.5 * float((weights.astype(float) ** 2).sum() + (biases**2).sum()) + c * float((slack**2).sum())


def timed(fit: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and of processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    fit()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=4_096)
    parser.add_argument("--c", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2])
    chosen = parser.parse_args()
    x, y = features(chosen.samples, chosen.features)
    double = x.astype(np.float64)
    warnings.simplefilter("ignore", ConvergenceWarning)
    for c in chosen.c:
        ours = L2SVM(C=c)
        wall, cpu = timed(lambda model=ours: model.fit(x, y))
        reached = objective(ours.coef_, ours.intercept_, double, y, c)
        lowest = reached
        theirs = []
        for tol in TOLERANCES:
            model = LinearSVC(C=c, dual=False, tol=tol)
            seconds = timed(lambda model=model: model.fit(double, y))
            theirs.append((objective(model.coef_, model.intercept_, double, y, c), tol, *seconds))
            lowest = min(lowest, theirs[-1][0])
            if theirs[-1][0] <= reached * (1 + 1e-3):
                break
        found, tol, their_wall, their_cpu = next(t for t in theirs if t[0] <= lowest * (1 + 1e-3))
        print(
            f"{chosen.samples} x {chosen.features}, C={c:g}: ours {wall:.1f} s, {reached / lowest - 1:.1e} above the "
            f"lowest; LinearSVC(tol={tol:g}) {their_wall:.1f} s, {found / lowest - 1:.1e} above; "
            f"ratio {their_wall / wall:.1f} on the clock, {their_cpu / cpu:.1f} in processor time",
            flush=True,
        )


if __name__ == "__main__":
    main()
