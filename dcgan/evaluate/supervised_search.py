"""The supervised baseline's random search. Its ranges were not published; these are this project's.

Section 5.2 of the paper has "random search over 64 hyperparameter trials"; see `supervised` for the rest.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from dcgan.config import Model, digest
from dcgan.evaluate import supervised
from dcgan.evaluate.inputs import draw
from dcgan.evaluate.samples import NotConvergedError
from dcgan.evaluate.supervised import DIVERGED, EPOCHS, Hyperparameters, Images

LEARNING_RATES = (1e-4, 1e-2)  # log-uniform, around the 2e-4 and 5e-4 of the paper and of its SVHN code
BETAS1 = (0.5, 0.9)  # uniform, from the paper's to Adam's own
WEIGHT_DECAYS = (1e-6, 1e-2)  # log-uniform, around the original code's 1e-5
DROPOUTS = (0.0, 0.7)  # uniform, before the output; the discriminator has none
BATCH_SIZES = (32, 64, 128)  # up to the paper's
IMAGES = "images.npz"  # in the search's directory

Trial = dict[str, Any]
Maker = Callable[[Callable[[Trial], Trial], Sequence[Trial]], Iterable[Trial | None]]


def sample(seed: int, trial: int, epochs: int = EPOCHS) -> Hyperparameters:
    """The settings of trial number `trial`, within the ranges above: the same in a search of any length."""
    rng = np.random.default_rng((seed, trial))
    return Hyperparameters(
        learning_rate=_log_uniform(rng, *LEARNING_RATES),
        beta1=float(rng.uniform(*BETAS1)),
        weight_decay=_log_uniform(rng, *WEIGHT_DECAYS),
        dropout=float(rng.uniform(*DROPOUTS)),
        batch_size=int(rng.choice(BATCH_SIZES)),
        epochs=epochs,
    )


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)  # rounding may step outside


def score(
    train: Images,
    validation: Images,
    test: Images,
    model: Model,
    directory: Path,
    *,
    labels_per_class: int = 100,
    trials: int = 64,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: str = "cpu",
    maker: Maker = map,
) -> dict[str, float]:
    """Random search over `trials` classifiers; errors are shares (0 to 1, lower is better) of wrong classes.

    x: uint8 (N, C, H, W), y: int64 (N,). It learns from `labels_per_class` random images of each class of train; the
    trial with the lowest error on validation, the first of equal ones, is scored on test, once. Returns
    `supervised/validation_error`, `supervised/test_error`, the chosen `supervised/trial` and `supervised/epoch`,
    `supervised/failed` (how many trials failed or diverged), and the chosen trial's hyperparameters.

    `maker` runs the trials: in this process one after the other, or as `cluster_search.search` does. Images and each
    trial's weights (4 MB at width 64 and 32 pixels) go through `directory`, which the caller may remove afterwards.
    Raises ValueError for images or labels that don't fit, or a class with too few; NotConvergedError if no trial
    learns.
    """
    supervised.check(train, validation=validation, test=test)
    if min(labels_per_class, trials, epochs) < 1:
        raise ValueError(f"labels_per_class={labels_per_class}, trials={trials}, epochs={epochs}: each is at least 1")
    if (fewest := np.bincount(train[1]).min()) < labels_per_class:
        raise ValueError(f"labels_per_class={labels_per_class}, but a class of train has {fewest} images")
    net = supervised.classifier_for(train, model)
    rows = draw(train[1], labels_per_class, (seed,))
    arrays = [train[0][rows], train[1][rows], *validation]
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(directory / IMAGES, *arrays)
    content = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    same = {"seed": seed, "model": model.model_dump(mode="json"), "images": content}
    settings: list[Trial] = [
        {"hyperparameters": asdict(sample(seed, trial, epochs)), **same} for trial in range(trials)
    ]
    results = list(maker(partial(run_trial, directory, device), settings))

    errors = [DIVERGED if result is None else result["validation_error"] for result in results]
    chosen = int(np.argmin(errors))
    best = results[chosen]
    if best is None or not best["epoch"]:
        raise NotConvergedError(f"none of {trials} trials has learned: each failed or has a loss that is not finite")
    net.load_state_dict(load_file(_weights(directory, settings[chosen])))
    wrong = supervised.classify(net.to(device), test[0], device) != test[1]
    return {
        "supervised/validation_error": errors[chosen],
        "supervised/test_error": float(wrong.mean()),
        "supervised/trial": float(chosen),
        "supervised/epoch": float(best["epoch"]),
        "supervised/failed": float(sum(result is None or not result["epoch"] for result in results)),
        **{f"supervised/{name}": float(value) for name, value in settings[chosen]["hyperparameters"].items()},
    }


def run_trial(directory: Path, device: str, trial: Trial) -> Trial:
    """Train one trial of `score` on the images in `directory`; its weights stay there; returns its error and epoch."""
    with np.load(directory / IMAGES) as arrays:
        train_x, train_y, validation_x, validation_y = arrays.values()
    settings = Hyperparameters(**trial["hyperparameters"])
    model = Model.model_validate(trial["model"])
    trained = supervised.train_classifier(
        (train_x, train_y), (validation_x, validation_y), model, settings, trial["seed"], device
    )
    if trained.weights:
        save_file(trained.weights, _weights(directory, trial))
    return {"validation_error": trained.validation_error, "epoch": trained.epoch}


def _weights(directory: Path, trial: Trial) -> Path:
    return directory / f"{digest(trial)}.safetensors"
