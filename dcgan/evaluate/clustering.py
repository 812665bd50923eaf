"""k-means on features, train and test merged: how well the clusters match classes that were never seen."""

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from dcgan.config import Evaluate
from dcgan.evaluate.inputs import Labelled, check
from dcgan.evaluate.kmeans import kmeans
from dcgan.evaluate.samples import Samples, device


def score(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    settings: Evaluate,
    validation: Labelled | None = None,
) -> dict[str, float]:
    """`clustering/nmi`, `clustering/nmi_geometric`, `clustering/accuracy` (0 to 1), `clustering/ari` (-0.5 to 1).

    Higher is better in all. x: float16 or float32 (N, F), y: int64 (N,); validation is part of what is published as
    train, and is merged too. There are as many clusters as classes; of `settings.restarts` k-means++ starts the one of
    lowest inertia is scored, a choice that uses no labels. Distances are between unscaled features, pixels in [0, 1]
    too: on MNIST's pixels the NMI is then near the published .4997 (DAC, ICCV 2017), while standardised it is at most
    .435. `tests/benchmarks/raw_pixel_clustering.py` measures how near.
    Raises ValueError for input that `inputs.check` rejects.
    """
    # Some data sets are clustered whole and have no test images.
    check(train_x, train_y, *((test_x, test_y) if len(test_y) else (train_x, train_y)), validation)
    given = [(train_x, train_y), *([validation] if validation else []), (test_x, test_y)]
    parts = [(x, y) for x, y in given if len(y)]
    merged = Samples.centred(np.concatenate([x for x, _ in parts]) if len(parts) > 1 else train_x, device())
    labels = np.concatenate([y for _, y in parts])
    return compare(labels, kmeans(merged, len(np.unique(labels)), settings.restarts, settings.seed).labels)


def compare(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """How well clusters (N,) match labels (N,), whatever their numbers; names and ranges as in `score`.

    `nmi` divides the mutual information by the arithmetic mean of both entropies, `nmi_geometric` by the geometric
    (scikit-learn's default before 0.22, which the literature's figures may use). `accuracy` counts matches under the
    best assignment of clusters to classes.
    """
    return {
        "clustering/nmi": float(normalized_mutual_info_score(labels, clusters, average_method="arithmetic")),
        "clustering/nmi_geometric": float(normalized_mutual_info_score(labels, clusters, average_method="geometric")),
        "clustering/ari": float(adjusted_rand_score(labels, clusters)),
        "clustering/accuracy": matched(labels, clusters),
    }


def matched(labels: np.ndarray, clusters: np.ndarray) -> float:
    """The share of (N,) images whose cluster is assigned to their class, in the best one-to-one assignment."""
    classes, class_of = np.unique(labels, return_inverse=True)
    names, cluster_of = np.unique(clusters, return_inverse=True)
    counts = np.zeros((len(classes), len(names)), np.int64)
    np.add.at(counts, (class_of, cluster_of), 1)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))
