"""Exact k-nearest-neighbour accuracy: whether images of a class lie near each other in feature space."""

import numpy as np
import torch

from dcgan.config import Evaluate
from dcgan.evaluate.samples import Samples, check, check_classes, hold_out, labelled

QUERIES = 1024  # images compared at once with all references: 200 MiB of distances to 50,000


def score(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, settings: Evaluate
) -> dict[str, float]:
    """`knn/accuracy` on test (0 to 1, higher is better) and `knn/neighbours`, the number that was chosen.

    x: float32 (N, F), y: int64 (N,). Euclidean distance between features as they are, as in `clustering`: on raw
    pixels that is the classical classifier (MNIST 96.9 %), where standardising would blow up the pixels of the border.
    Of `settings.labels` random labels (0: all) a fifth is held out; the `settings.neighbours` with the highest
    accuracy there, the smaller where two are equal, is used with all of them; test is scored once.
    Raises ValueError for input that `samples` refuses, or if there are fewer images to compare with than neighbours.
    """
    check(train_x, train_y, test_x, test_y)
    check_classes(train_y, test_y)
    rows = labelled(train_y, settings.labels, settings.seed)
    train, labels = Samples.centred(train_x).take(rows), train_y[rows]
    fit, held = hold_out(labels, settings.seed)
    tried = sorted(set(settings.neighbours))
    if tried[-1] > len(fit):
        raise ValueError(
            f"evaluate.neighbours={tried[-1]}, but train has only {len(fit)} labelled images to compare with after a "
            "fifth is held out"
        )
    validation = accuracies(train.take(fit), labels[fit], train.take(held), labels[held], tried)
    chosen = tried[int(np.argmax(validation))]
    (accuracy,) = accuracies(train, labels, train.like(test_x), test_y, [chosen])
    return {"knn/accuracy": accuracy, "knn/neighbours": float(chosen)}


def accuracies(
    known: Samples, known_y: np.ndarray, asked: Samples, asked_y: np.ndarray, neighbours: list[int]
) -> list[float]:
    """The share of `asked` (N,) that the vote of k nearest `known` gets right, for each k of ascending `neighbours`.

    Classes with equally many votes: the one whose nearest voter is nearest.
    """
    classes, numbers = np.unique(known_y, return_inverse=True)
    right = np.zeros(len(neighbours), np.int64)
    for where, queries in asked.blocks(QUERIES):
        nearest = torch.from_numpy(numbers)[_nearest(known, queries, neighbours[-1])]
        truth = asked_y[where]
        right += [(classes[_vote(nearest[:, :k], len(classes))] == truth).sum() for k in neighbours]
    return [float(count) / len(asked) for count in right]


def _nearest(known: Samples, queries: torch.Tensor, count: int) -> torch.Tensor:
    """int64 (Q, count): positions in `known` of each query's nearest, the nearest first."""
    distances = torch.empty(len(queries), len(known))
    for where, block in known.blocks():
        # Squared, less the query's own length, which does not change the order.
        distances[:, where] = torch.addmm(block.square().sum(1), queries, block.T, alpha=-2)
    return distances.topk(count, largest=False).indices


def _vote(nearest: torch.Tensor, classes: int) -> np.ndarray:
    """(Q,): the class number with most votes among (Q, k) ordered class numbers."""
    votes = torch.zeros(len(nearest), classes).scatter_add_(1, nearest, torch.ones(nearest.shape))
    closeness = (1 / (2.0 + torch.arange(nearest.shape[1]))).expand(nearest.shape)  # below 1: it decides ties alone
    first = torch.zeros_like(votes).scatter_reduce_(1, nearest, closeness, "amax")
    return (votes + first).argmax(1).numpy()
