"""Exact k-nearest-neighbour accuracy: whether images of a class lie near each other in feature space."""

import numpy as np
import torch

from dcgan.config import Evaluate
from dcgan.evaluate.inputs import Labelled, check, check_classes, check_neighbours, draw, labelled, split_for_choice
from dcgan.evaluate.samples import Samples, device

CHOICE_DRAWS = 10  # on which the number of neighbours is chosen, as C is
QUERIES = 1024  # images compared at once with all references: 200 MiB of distances to 50,000


def score(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    settings: Evaluate,
    validation: Labelled | None = None,
) -> dict[str, float]:
    """`knn/accuracy` on test (0 to 1, higher is better), the chosen `knn/neighbours`, and `knn/validation_accuracy`.

    x: float16 or float32 (N, F), y: int64 (N,). Euclidean distance between unscaled features, as in `clustering`: on
    raw pixels that is the classical classifier (MNIST 96.9 %), while standardising would blow up the border pixels.
    `settings.labels` random labels are used (0: all). The one of `settings.neighbours` with the highest accuracy on
    `validation`, the smaller of equal ones, is chosen; without `validation`, on a fifth of the labels, which are then
    used with the others. Test is scored once.
    Raises ValueError for input that `inputs` rejects, or if there are fewer images to compare with than neighbours.
    """
    check(train_x, train_y, test_x, test_y, validation)
    check_classes(train_y, test_y)
    rows = labelled(train_y, settings.labels, settings.seed)
    train, labels = Samples.centred(train_x, device()).take(rows), train_y[rows]
    tried = sorted(set(settings.neighbours))
    fit, held, held_y = split_for_choice(train, labels, validation, settings.seed)
    check_neighbours(settings, len(fit), validation is not None)
    found = accuracies(train.take(fit), labels[fit], held, held_y, tried)
    chosen = tried[int(np.argmax(found))]
    (accuracy,) = accuracies(train, labels, train.like(test_x), test_y, [chosen])
    return {"knn/accuracy": accuracy, "knn/validation_accuracy": max(found), "knn/neighbours": float(chosen)}


def score_few_labels(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    settings: Evaluate,
    validation: Labelled | None = None,
) -> dict[str, float]:
    """`knn_few_labels/accuracy` (higher is better), its `_std` over draws, `/validation_accuracy` and `/neighbours`.

    `svm.score_few_labels` with neighbours instead of a classifier: its draws, its validation images, and one number of
    `settings.neighbours` for all draws. Raises ValueError as that does, or for more neighbours than labels.
    """
    check(train_x, train_y, test_x, test_y, validation)
    check_classes(train_y, test_y)
    samples = Samples.centred(train_x, device())
    pool, held, held_y = split_for_choice(samples, train_y, validation, settings.seed)
    draws = [pool[draw(train_y[pool], settings.labels_per_class, (settings.seed, i))] for i in range(settings.draws)]
    tried = sorted(set(settings.neighbours))
    check_draw(settings, len(draws[0]))
    found = [accuracies(samples.take(rows), train_y[rows], held, held_y, tried) for rows in draws[:CHOICE_DRAWS]]
    means = np.mean(found, axis=0)
    chosen = tried[int(np.argmax(means))]
    test = samples.like(test_x)
    scores = [accuracies(samples.take(rows), train_y[rows], test, test_y, [chosen])[0] for rows in draws]
    return {
        "knn_few_labels/accuracy": float(np.mean(scores)),
        "knn_few_labels/accuracy_std": float(np.std(scores, ddof=1)),
        "knn_few_labels/validation_accuracy": float(max(means)),
        "knn_few_labels/neighbours": float(chosen),
    }


def check_draw(settings: Evaluate, labels: int) -> None:
    """Raise ValueError if the largest of `settings.neighbours` exceeds the labels of a draw."""
    if (most := max(settings.neighbours)) > labels:
        raise ValueError(f"evaluate.neighbours={most}, but a draw has only {labels} labels")


def accuracies(
    known: Samples, known_y: np.ndarray, asked: Samples, asked_y: np.ndarray, neighbours: list[int]
) -> list[float]:
    """The share of `asked` (N,) that a vote of the k nearest `known` gets right, for each k of ascending `neighbours`.

    Ties between classes go to the one with the nearest voter.
    """
    classes, numbers = np.unique(known_y, return_inverse=True)
    right = np.zeros(len(neighbours), np.int64)
    for where, queries in asked.blocks(QUERIES):
        nearest = torch.from_numpy(numbers)[_nearest(known, queries, neighbours[-1]).cpu()]
        truth = asked_y[where]
        right += [(classes[_vote(nearest[:, :k], len(classes))] == truth).sum() for k in neighbours]
    return [float(count) / len(asked) for count in right]


def _nearest(known: Samples, queries: torch.Tensor, count: int) -> torch.Tensor:
    """int64 (Q, count): positions in `known` of each query's nearest, the nearest first."""
    distances = torch.empty(len(queries), len(known), device=known.device)
    for where, block in known.blocks():
        # Squared, less the query's own squared length, which does not change the order.
        distances[:, where] = torch.addmm(block.square().sum(1), queries, block.T, alpha=-2)
    return distances.topk(count, largest=False).indices


def _vote(nearest: torch.Tensor, classes: int) -> np.ndarray:
    """(Q,): the class number with most votes among (Q, k) ordered class numbers."""
    votes = torch.zeros(len(nearest), classes).scatter_add_(1, nearest, torch.ones(nearest.shape))
    closeness = (1 / (2.0 + torch.arange(nearest.shape[1]))).expand(nearest.shape)  # below 1: it only breaks ties
    first = torch.zeros_like(votes).scatter_reduce_(1, nearest, closeness, "amax")
    return (votes + first).argmax(1).numpy()
