"""The evaluators: the four protocols of `evaluate.protocols`, listed here, and what only the reproduced tables use.

A protocol is (train_x (N, F), train_y (N,) int64, test_x, test_y, settings, validation) -> {"protocol/metric": value},
deterministic given `settings.seed`. Every choice is made on `validation` (features, labels) or, where that is None, on
a split of train. `published` holds the literature's figures.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dcgan.config import Evaluate, Protocol
from dcgan.evaluate import clustering, knn, svm
from dcgan.evaluate.inputs import Labelled

Score = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Evaluate, Labelled | None], dict[str, float]]


class Evaluator(NamedTuple):
    """A protocol's name, which its metrics begin with, its function, and the settings of `evaluate` that it reads."""

    name: str
    score: Score
    settings: tuple[str, ...]


EVALUATORS: dict[Protocol, Evaluator] = {
    "svm": Evaluator("svm", svm.score, ("labels", "standardise", "c_grid", "seed")),
    "svm_few_labels": Evaluator(
        "svm_few_labels", svm.score_few_labels, ("labels_per_class", "draws", "standardise", "c_grid", "seed")
    ),
    "clustering": Evaluator("clustering", clustering.score, ("restarts", "seed")),
    "knn": Evaluator("knn", knn.score, ("labels", "neighbours", "seed")),
}
