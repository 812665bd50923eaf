"""Trains the discriminator's architecture as a classifier on a few labels only: a row of the paper's SVHN table.

Section 5.2: "a purely supervised CNN with the same architecture on the same data", optimised "via random search over
64 hyperparameter trials", has 28.87 % error on validation, while the other rows are errors on test; here both are
measured. Neither the search's ranges nor anything else about that training was published: Adam, the initialisation and
the scaling of pixels are the discriminator's own; ranges, epochs and early stopping are this project's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgan.config import Model
from dcgan.models import STEM, Discriminator, initialise

EPOCHS = 100
VALIDATE_EVERY = 5  # epochs: a forward pass of 10,000 images costs as much as three epochs of 1,000 labels
PATIENCE = 4  # validations without a lower error that end a trial
CHUNK = 500  # images classified at once
DIVERGED = 1.0  # the error of a trial that failed or whose loss is not finite

Images = tuple[np.ndarray, np.ndarray]  # uint8 (N, C, H, W) and int64 labels (N,)


@dataclass(frozen=True)
class Hyperparameters:
    """What the search varies, except `epochs`, the most that a trial may take."""

    learning_rate: float
    beta1: float
    weight_decay: float
    dropout: float
    batch_size: int
    epochs: int = EPOCHS


@dataclass(frozen=True)
class Trained:
    """The lowest validation error (0 to 1), its epoch, and the weights then; none if the loss was not finite."""

    validation_error: float
    epoch: int
    weights: dict[str, Tensor]


def classifier(model: Model, channels: int, classes: int, size: int, dropout: float = 0.0) -> Discriminator:
    """images (N, channels, size, size) in [-1, 1] -> logits (N, classes): a discriminator with one output per class.

    Spectral normalisation, a remedy for the adversarial game, is left out. Raises ValueError for a conditional model or
    one class.
    """
    if model.conditional:
        raise ValueError("model.conditional=true would be told the class that a classifier has to find")
    if classes < 2:
        raise ValueError("train has one class only: there is nothing to tell apart")
    net = Discriminator(model, channels, classes, size)
    output = nn.Linear(net.output.in_features, classes, bias=False)
    net.output = nn.Sequential(nn.Dropout(dropout), output)  # type: ignore[assignment]
    return net


def train_classifier(
    train: Images, validation: Images, model: Model, settings: Hyperparameters, seed: int, device: str = "cpu"
) -> Trained:
    """Train a `classifier` from scratch by Adam on the cross-entropy, and keep the weights that validate best.

    Images are uint8 (N, C, H, W), labels int64 (N,) from 0 to K-1. Training ends after `settings.epochs`, after
    PATIENCE validations without a lower error, or when the loss is not finite, which counts as an error of 1. The
    result follows from `seed`: on a CPU bit for bit, given the number of threads. Raises ValueError as `check` does.
    """
    check(train, validation=validation)
    images, labels = (torch.tensor(array, device=device) for array in train)
    with torch.random.fork_rng(devices=[device] if device == "cuda" else []):  # for the dropout
        torch.manual_seed(seed)
        net = classifier_for(train, model, settings.dropout)
        initialise(net, torch.Generator().manual_seed(seed))
        net = net.to(device).to(memory_format=torch.channels_last)  # a CPU is a quarter faster with it
        best = Trained(DIVERGED, 0, {})
        for epoch, loss in _epochs(net, images, labels, settings, seed):
            if not math.isfinite(loss):
                return Trained(DIVERGED, 0, {})
            if epoch % VALIDATE_EVERY and epoch < settings.epochs:
                continue
            error = float((classify(net, validation[0], device) != validation[1]).mean())
            if error < best.validation_error or not best.weights:
                best = Trained(error, epoch, _copy(net))
            elif epoch - best.epoch >= PATIENCE * VALIDATE_EVERY:
                break
    return best


def _epochs(
    net: nn.Module, images: Tensor, labels: Tensor, settings: Hyperparameters, seed: int
) -> Iterator[tuple[int, float]]:
    """Train `net` epoch by epoch; yields the epoch's number, from 1 on, and its mean loss."""
    optimizer = torch.optim.Adam(
        net.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, 0.999),
        weight_decay=settings.weight_decay,  # added to the gradient, as in the discriminator's training
    )
    parts = max(1, len(images) // settings.batch_size)  # equal batches, none of a single image, and all are used
    for epoch in range(1, settings.epochs + 1):
        net.train()
        total = torch.zeros((), device=images.device)
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        for rows in torch.from_numpy(order).to(images.device).tensor_split(parts):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(_pixels(images[rows])), labels[rows])
            loss.backward()
            optimizer.step()
            total += loss.detach()
        yield epoch, total.item() / parts


@torch.no_grad()
def classify(net: nn.Module, images: np.ndarray, device: str) -> np.ndarray:
    """int64 (N,): the class with the highest logit."""
    net.eval()
    chunks = (torch.tensor(images[first : first + CHUNK], device=device) for first in range(0, len(images), CHUNK))
    return torch.cat([net(_pixels(chunk)).argmax(1) for chunk in chunks]).cpu().numpy()


def _copy(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone(memory_format=torch.contiguous_format).cpu() for key, value in net.state_dict().items()}


def _pixels(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1], as the discriminator sees them (paper, section 4)."""
    return images.float().div_(127.5).sub_(1)


def classifier_for(train: Images, model: Model, dropout: float = 0.0) -> Discriminator:
    """A `classifier` of the shape and the classes of `train`, whose labels are 0 to K-1."""
    _, channels, size, _ = train[0].shape
    return classifier(model, channels, int(train[1].max()) + 1, size, dropout)


def check(train: Images, **others: Images) -> None:
    """Raises ValueError, naming the split, for images or labels that can't be trained on or scored."""
    squares = [(size, size) for size in STEM]
    for split, (images, labels) in {"train": train, **others}.items():
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[2:] not in squares or not len(images):
            wanted = f"uint8 (N, C, H, W) with H = W one of {', '.join(map(str, STEM))}"
            raise ValueError(f"{split} has {images.dtype} images {images.shape}, not {wanted}")
        if images.shape[1:] != train[0].shape[1:]:
            raise ValueError(f"{split} has images {images.shape[1:]} and train {train[0].shape[1:]}")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"{split} has {labels.dtype} labels {labels.shape}, not int64 ({len(images)},)")
        if labels.min() < 0:
            raise ValueError(f"{split} has {(labels < 0).sum()} images without a label")
    classes = np.arange(max(labels.max() for _, labels in (train, *others.values())) + 1)
    if len(missing := np.setdiff1d(classes, train[1])):
        raise ValueError(f"train has no image of class {', '.join(map(str, missing))}: it needs 0 to {classes[-1]}")
