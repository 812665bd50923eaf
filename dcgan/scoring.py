"""Scores features by a protocol, beside two controls: the same net before training, and raw pixels.

What each of the three gives is kept under `<home>/scores/`, by a name that covers everything it depends on: features,
labels, the settings that the protocol reads, and the code of `dcgan.evaluate`. So an interrupted evaluation continues,
and runs on the same images share the scores of their pixels.
"""

import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dcgan import checkpoint, environment, evaluate, feature_banks, storage
from dcgan.config import Evaluate, Protocol, digest
from dcgan.data.store import Store
from dcgan.evaluate import EVALUATORS, Evaluator
from dcgan.evaluate.inputs import raw_pixels
from dcgan.evaluate.samples import computing_on
from dcgan.run import Run

REPRESENTATIONS = ("discriminator", "random_init", "raw_pixels")


class Scores(NamedTuple):
    """values: {metric: value}. seconds, commit: what computing them took, and of which code."""

    values: dict[str, float]
    seconds: float
    commit: str


def score(run: Run, protocol: Protocol) -> dict[str, dict[str, float]]:
    """Score the features by one protocol, with the same features at random init and raw pixels as controls.

    Returns {"discriminator": {metric: value}, "random_init": ..., "raw_pixels": ...} and writes it, with the settings,
    to scores/<protocol>.json; scores of the same checkpoint, settings and code are not computed again.
    """
    settings, directory, evaluator = run.experiment.evaluate, checkpoint.chosen(run), EVALUATORS[protocol]
    described = {
        "protocol": protocol,
        "checkpoint": int(directory.name),
        "weights": storage.fingerprint(directory),
        "chosen": settings.checkpoint,
        "images": run.scored,
        "settings": used(evaluator, settings),
        "code": code(),
    }
    known = run.scores().get(protocol, {})
    if {key: known.get(key) for key in described} == described:
        return known["scores"]
    with computing_on(run.experiment.compute.device):
        found = {source: of_run(run, evaluator, source) for source in REPRESENTATIONS}
    scores = {source: each.values for source, each in found.items()}
    content = {
        **described,
        "commit": ", ".join(dict.fromkeys(each.commit for each in found.values())),
        "seconds": sum(each.seconds for each in found.values()),
        "scores": scores,
    }
    storage.write_json(run.path / "scores" / f"{protocol}.json", content)
    return scores


def of_run(run: Run, evaluator: Evaluator, source: str) -> Scores:
    """The scores of one of REPRESENTATIONS of a run. Raises FileNotFoundError if its features were not extracted."""
    store, settings = run.scored_store(), run.experiment.evaluate
    if source == "raw_pixels":
        return of_pixels(run.home, store, settings, evaluator)
    step = int(checkpoint.chosen(run).name) if source == "discriminator" else 0
    identity = feature_banks.fingerprint(run, source, step)
    return _once(run.home, store, settings, evaluator, identity, partial(feature_banks.read_bank, run, source, step))


def of_pixels(home: Path, store: Store, settings: Evaluate, evaluator: Evaluator) -> Scores:
    """The scores of the images themselves, float32 (N, C * H * W) in [0, 1]."""
    return _once(home, store, settings, evaluator, "pixels", lambda split: raw_pixels(store.images(split)))


def used(evaluator: Evaluator, settings: Evaluate) -> dict[str, Any]:
    """The settings that a protocol reads."""
    return settings.model_dump(mode="json", include=set(evaluator.settings))


def _once(
    home: Path,
    store: Store,
    settings: Evaluate,
    evaluator: Evaluator,
    identity: str,
    load: Callable[[str], np.ndarray],
) -> Scores:
    """identity: of the features that `load` gives for a split of the store."""
    covered = [evaluator.name, store.fingerprint, identity, used(evaluator, settings), code()]
    file = home / "scores" / f"{digest(covered)}.json"
    return Scores(**storage.once(file, partial(_compute, store, settings, evaluator, load)))


def _compute(
    store: Store, settings: Evaluate, evaluator: Evaluator, load: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    began, commit = time.perf_counter(), environment.commit()
    if evaluator.name == "clustering":
        labels = {split: store.groups(split) for split in store.clustered}
    else:
        labels = {split: store.labels(split) for split in store.scored}
    splits = {split: (load(split), labels[split]) for split in labels}
    train = splits["train"]
    test = splits.get("test", (train[0][:0], train[1][:0]))  # a data set that is clustered whole has none
    values = evaluator.score(*train, *test, settings, splits.get("validation"))
    return {"values": values, "seconds": time.perf_counter() - began, "commit": commit}


@cache
def code() -> str:
    """The digest of the modules that scores depend on, also where they differ from a commit."""
    sources = sorted(Path(evaluate.__file__).parent.glob("*.py"))
    return storage.digest(b"".join(source.read_bytes() for source in sources))
