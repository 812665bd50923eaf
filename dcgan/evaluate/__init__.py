"""The evaluators: the four protocols of `evaluate.protocols`, listed here, and what only the reproduced tables use.

A protocol is (train_x (N, F), train_y (N,) int64, test_x, test_y, settings, validation) -> {"protocol/metric": value},
deterministic given `settings.seed`. Every choice is made on `validation` (features, labels) or, where that is None, on
a split of train. `published` holds the literature's figures.
"""

from collections.abc import Callable

import numpy as np

from dcgan.config import Evaluate, Protocol
from dcgan.evaluate import clustering, knn, svm
from dcgan.evaluate.inputs import Labelled

Evaluator = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Evaluate, Labelled | None], dict[str, float]]

EVALUATORS: dict[Protocol, Evaluator] = {
    "svm": svm.score,
    "svm_few_labels": svm.score_few_labels,
    "clustering": clustering.score,
    "knn": knn.score,
}
