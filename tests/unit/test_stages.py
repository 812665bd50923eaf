"""Scoring as a stage: which splits, on which device, by which code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fabricated import write_store

from dcgan import stages, summary
from dcgan.config import build
from dcgan.data.store import Description, Store
from dcgan.evaluate import EVALUATORS, samples
from dcgan.run import Run

SMALL = ("train.steps=2", "train.batch_size=16", "train.checkpoint_every=2", "model.width=2", "compute.workers=0")


def extracted(home: Path, store: Store, *overrides: str) -> Run:
    run = Run.create(build("digits", [f"data.home={home}", *SMALL, *overrides]), store)
    stages.train(run)
    stages.extract(run)
    return run


def test_images_without_a_test_split_are_clustered_whole(tmp_path: Path) -> None:
    """As those of ImageNet-10: features, random init and pixels, one after the other."""
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 256, (1, 32, 32), np.uint8), i % 2) for i in range(40)]
    store = write_store(tmp_path, Description("random", ("a", "b"), 32, 1, "none"), {"train": pairs})
    run = extracted(tmp_path, store, "evaluate.protocols=[clustering]", "evaluate.restarts=2")
    scores = stages.evaluate(run, "clustering")
    assert list(scores) == list(stages.REPRESENTATIONS)
    assert all(0.5 <= found["clustering/accuracy"] <= 1 for found in scores.values())


def test_scores_say_which_code_computed_them(
    tmp_path: Path, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = extracted(tmp_path, make_store(tmp_path, channels=1), "evaluate.labels=40", "evaluate.neighbours=[1]")
    monkeypatch.setattr(summary, "commit", lambda: "of this code")
    stages.evaluate(run, "knn")
    monkeypatch.setattr(summary, "commit", lambda: "of other code")
    stages.evaluate(run, "knn")
    assert run.scores()["knn"]["commit"] == "of this code"


def test_scores_are_computed_where_the_experiment_says(
    tmp_path: Path, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = extracted(tmp_path, make_store(tmp_path, channels=1), "compute.device=cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []

    def score(*_: Any) -> dict[str, float]:
        seen.append(samples.device())
        return {"knn/accuracy": 0.5}

    monkeypatch.setitem(EVALUATORS, "knn", score)
    stages.evaluate(run, "knn")
    assert seen == ["cpu"] * 3
    assert samples.device() == "cuda"
    assert samples.device("cpu") == "cpu"
