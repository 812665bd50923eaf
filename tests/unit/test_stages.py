"""Scoring as a stage: which splits, on which device, by which code."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fabricated import save, write_store

from dcgan import environment, feature_banks, preemption, scoring, stages, storage, summary
from dcgan.config import build, override
from dcgan.data.store import Description, Store
from dcgan.evaluate import EVALUATORS, samples
from dcgan.run import Run
from dcgan.step import Game
from dcgan.train import DivergedError, StoppedError

SMALL = ("train.steps=2", "train.batch_size=16", "train.checkpoint_every=2", "model.width=2", "compute.workers=0")


def extracted(home: Path, store: Store, *overrides: str) -> Run:
    run = Run.create(build("digits", [f"data.home={home}", *SMALL, *overrides]), store)
    stages.train(run)
    stages.extract(run)
    return run


def test_a_training_that_diverged_has_not_ended(
    tmp_path: Path, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(build("digits", [f"data.home={tmp_path}", *SMALL]), make_store(tmp_path, channels=1))
    play = Game.step
    monkeypatch.setattr(Game, "step", lambda *args: {name: value * float("nan") for name, value in play(*args).items()})
    with pytest.raises(DivergedError, match=f"run {run.name}: .* not finite in the steps up to 2"):
        stages.train(run)


def test_a_training_that_another_process_stopped_has_not_ended(
    tmp_path: Path, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(build("digits", [f"data.home={tmp_path}", *SMALL]), make_store(tmp_path, channels=1))
    play = Game.step

    def playing(*args: Any) -> Any:
        (run.path / preemption.FILE).touch()
        return play(*args)

    monkeypatch.setattr(Game, "step", playing)
    with pytest.raises(StoppedError, match=f"run {run.name} was stopped at step 1, which is kept"):
        stages.train(run)


def test_other_images_may_be_scored_than_those_trained_on(tmp_path: Path) -> None:
    """As CIFAR-10 by nets of ImageNet: here digits, of which others are held out by default."""
    words = ["data.test_fraction=0.4", "evaluate.images=digits", "evaluate.labels=50", "evaluate.neighbours=[1]"]
    experiment = build("digits", [f"data.home={tmp_path}", *SMALL, *words])
    run = stages.ingest(experiment)
    theirs = stages.images(experiment, build("digits", [f"data.home={tmp_path}"]).data)
    assert run.scored == theirs.fingerprint != run.fingerprint
    stages.train(run)
    stages.extract(run)
    stages.evaluate(run, "knn")
    assert run.scores()["knn"]["images"] == theirs.fingerprint
    for split in ("train", "test"):
        assert (
            len(feature_banks.read_bank(run, "random_init", 0, split))
            == theirs.count(split)
            != run.store().count(split)
        )


def test_the_record_of_where_it_was_trained_is_not_of_who_reports(
    tmp_path: Path, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here = environment.describe()
    monkeypatch.setattr(environment, "describe", lambda: {**here, "cpu": "that trains", "gpu": []})
    run = extracted(tmp_path, make_store(tmp_path, channels=1))
    monkeypatch.setattr(environment, "describe", lambda: {**here, "cpu": "that reports", "gpu": []})
    stages.report(run)
    assert summary.trained_on(run) == "that trains"


def test_images_without_a_test_split_are_clustered_whole(tmp_path: Path) -> None:
    """As those of ImageNet-10: features, random init and pixels, one after the other."""
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 256, (1, 32, 32), np.uint8), i % 2) for i in range(40)]
    store = write_store(tmp_path, Description("random", ("a", "b"), 32, 1, "none"), {"train": pairs})
    run = extracted(tmp_path, store, "evaluate.protocols=[clustering]", "evaluate.restarts=2")
    scores = stages.evaluate(run, "clustering")
    assert list(scores) == list(scoring.REPRESENTATIONS)
    assert all(0.5 <= found["clustering/accuracy"] <= 1 for found in scores.values())


def test_superclasses_are_clustered_where_there_are_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def score(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, *_: Any) -> dict:
        seen.append((train_x.max(), train_y.tolist(), test_y.tolist()))
        return {"clustering/accuracy": 0.5}

    pairs = [(np.full((1, 32, 32), 255, np.uint8), i % 4) for i in range(8)]
    description = Description(
        "random", tuple("abcd"), 32, 1, "none", superclasses=("x", "y"), superclass_of=(0, 1, 1, 0)
    )
    store = write_store(tmp_path, description, {"train": pairs, "test": pairs[1:4]})
    evaluator = EVALUATORS["clustering"]._replace(score=score)
    scoring.of_pixels(tmp_path, store, build("digits").evaluate, evaluator)
    assert seen == [(1.0, [0, 1, 1, 0] * 2, [1, 1, 0])], "pixels are in [0, 1]"


def test_scores_say_which_code_computed_them(
    tmp_path: Path, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = extracted(tmp_path, make_store(tmp_path, channels=1), "evaluate.labels=40", "evaluate.neighbours=[1]")
    monkeypatch.setattr(environment, "commit", lambda: "of this code")
    stages.evaluate(run, "knn")
    monkeypatch.setattr(environment, "commit", lambda: "of other code")
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

    monkeypatch.setitem(EVALUATORS, "knn", EVALUATORS["knn"]._replace(score=score))
    stages.evaluate(run, "knn")
    assert seen == ["cpu"] * 3
    assert samples.device() == "cuda"
    assert samples.device("cpu") == "cpu"


@pytest.fixture
def scored(tmp_path: Path, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> tuple[Run, list[Any]]:
    """A run with features, and what `knn` was called with: a single feature of the first image."""
    run = extracted(tmp_path, make_store(tmp_path, channels=1), "evaluate.protocols=[knn]")
    seen: list[Any] = []

    def score(train_x: np.ndarray, *_: Any) -> dict[str, float]:
        seen.append(float(train_x.astype(np.float64).sum()))
        return {"knn/accuracy": 0.5}

    monkeypatch.setitem(EVALUATORS, "knn", EVALUATORS["knn"]._replace(score=score))
    return run, seen


def again(run: Run, *overrides: str) -> Run:
    """The same run with other settings, without its scores."""
    shutil.rmtree(run.path / "scores", ignore_errors=True)
    return dataclasses.replace(run, experiment=override(run.experiment.model_dump(), overrides))


def test_an_interrupted_evaluation_continues(scored: tuple[Run, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = scored
    write = storage.write_json

    def full(path: Path, value: Any) -> None:
        if len(seen) == 3:
            raise OSError("a full disk")
        write(path, value)

    monkeypatch.setattr(storage, "write_json", full)
    with pytest.raises(OSError, match="a full disk"):
        stages.evaluate(run, "knn")
    monkeypatch.setattr(storage, "write_json", write)
    stages.evaluate(run, "knn")
    assert len(seen) == 4
    assert seen[2] == seen[3]
    assert len({*seen}) == 3


def test_settings_that_a_protocol_does_not_read_are_no_reason_to_score_anew(scored: tuple[Run, list[Any]]) -> None:
    run, seen = scored
    stages.evaluate(run, "knn")
    stages.evaluate(again(run, "evaluate.restarts=2", "evaluate.c_grid=[1]", "evaluate.inception=x"), "knn")
    assert len(seen) == 3
    stages.evaluate(again(run, "evaluate.neighbours=[2]"), "knn")
    assert len(seen) == 6


def test_runs_on_the_same_images_share_the_scores_of_their_pixels(scored: tuple[Run, list[Any]]) -> None:
    run, seen = scored
    stages.evaluate(run, "knn")
    other = Run.create(override(run.experiment.model_dump(), ["train.learning_rate=1e-3"]), run.store())
    stages.train(other)
    stages.extract(other)
    stages.evaluate(other, "knn")
    assert seen.count(seen[2]) == 1, "pixels"
    assert seen.count(seen[0]) == 1, "another net"


def test_other_code_scores_anew(scored: tuple[Run, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = scored
    stages.evaluate(run, "knn")
    stages.evaluate(run, "knn")
    assert len(seen) == 3
    monkeypatch.setattr(scoring, "code", lambda: "other")
    stages.evaluate(run, "knn")
    assert len(seen) == 6


def test_a_net_trained_anew_to_the_same_step_has_its_own_features_and_scores(scored: tuple[Run, list[Any]]) -> None:
    run, seen = scored
    stages.evaluate(run, "knn")
    shutil.rmtree(run.checkpoints)
    save(run, 2)  # a net that was not trained
    stages.extract(run)
    stages.evaluate(run, "knn")
    assert len(seen) == 4
    assert len(set(seen)) == 3
    assert seen[3] == seen[1], "the features of a net before training"
