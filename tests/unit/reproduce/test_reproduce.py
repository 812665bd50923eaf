"""Rows of a table: measured once a seed, kept, shown beside what was published; what can't be measured says why."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fabricated import write_store
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from sklearn.neighbors import KNeighborsClassifier

from dcgan import (
    checkpoint,
    cluster_search,
    config,
    environment,
    reproduce,
    sampling,
    stages,
    storage,
    summary,
    tracking,
    tracking_rows,
)
from dcgan.data.store import Description, Store
from dcgan.evaluate import EVALUATORS, samples
from dcgan.evaluate import image_quality as inception
from dcgan.evaluate.inputs import Labelled
from dcgan.evaluate.published import PAPER, PUBLISHED
from dcgan.evaluate.samples import NotConvergedError
from dcgan.reproduce import TABLES, cifar10, clustering, image_quality, measure, mnist, page, record, svhn
from dcgan.reproduce.overrides import check, home
from dcgan.reproduce.rows import Column, Figure, Measured, Row, Setting, Table, features, merged
from dcgan.run import Run

SMALL = ("digits/train.steps=4", "digits/train.checkpoint_every=2", "digits/train.batch_size=32", "compute.workers=0")
MODEL = ("digits/model.width=4", "digits/evaluate.labels=200", "digits/evaluate.labels_per_class=5")


def counted(setting: Setting) -> Measured:
    """How often it was called is left beside its own directory, which is removed."""
    setting.directory.mkdir(parents=True)
    (setting.directory.parent / f"call-{len(list(setting.directory.parent.glob('call-*')))}").touch()
    return Measured(
        {"a": Figure(0.5 + setting.seed / 10)}, f"seed {setting.seed}", {"chance, 1 in 1,000": {"a": Figure(0.1)}}
    )


def without_data(setting: Setting) -> Measured:
    raise FileNotFoundError(f"no photographs below {home(setting.overrides)}/x: give data.source")


def unstandardised(setting: Setting) -> Measured:
    raise NotConvergedError("L2-SVM 3 with C=1 has not come to its minimum: lower C")


def broken(setting: Setting) -> Measured:
    raise RuntimeError("a shape is wrong")


def trained(setting: Setting) -> Measured:
    run = setting.extracted("digits", ["svm", "knn"])
    return merged(features(run, "svm", {"a": "svm/accuracy"}), features(run, "knn", {"b": "knn/accuracy"}))


class Digits(Setting):
    """scikit-learn's digits in the place of any data set."""

    def experiment(
        self, preset: config.DataSet, *words: str, protocols: Sequence[config.Protocol] = ()
    ) -> config.Experiment:
        return super().experiment("digits", *words, protocols=protocols)


DIGITS: tuple[config.DataSet, ...] = ("digits",)
TABLE = Table(
    "Tiny",
    (Column("a", "accuracy, %", percent=True), Column("b", "error")),
    (
        Row("counted", "counted", {"a": Figure(0.25, 0.01)}, "Someone, 2015", counted, DIGITS),
        Row("absent", "absent", {}, "", without_data, DIGITS),
        Row("unstandardised", "unstandardised", {}, "", unstandardised, DIGITS),
        Row("broken", "broken", {}, "", broken, DIGITS),
        Row("quoted", "quoted", {"a": Figure(0.75)}, "Someone, 2015", "not measured: another model"),
        Row("trained", "trained", {}, "", trained, DIGITS),
    ),
    "A note.",
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, ...]:
    """Overrides for the table `tiny`, without an MLflow server."""
    monkeypatch.setitem(TABLES, "tiny", TABLE)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return (f"data.home={tmp_path / 'home'}",)


def test_a_row_is_measured_once_for_each_seed_and_its_spread_is_over_seeds(tiny: tuple[str, ...]) -> None:
    for _ in range(2):
        found = measure.one("tiny", "counted", tiny, seeds=3)
    value, spread, of = found["figures"]["a"]
    assert (value, spread, of) == (pytest.approx(0.6), pytest.approx(0.1), "3 seeds")
    calls = list((home(tiny) / "reproduced" / "tiny" / "counted").rglob("call-*"))
    assert len(calls) == 3
    assert sorted(path.suffix for path in calls[0].parent.iterdir() if path not in calls) == [".json"] * 3
    assert found["command"] == f"dcgan reproduce tiny counted --seeds 3 {tiny[0]}"
    assert found["hardware"]
    assert found["date"]


def test_a_row_is_a_run_in_mlflow(tiny: tuple[str, ...]) -> None:
    measure.one("tiny", "counted", tiny, seeds=1)
    client = MlflowClient(tracking.uri(home(tiny)))
    experiment = client.get_experiment_by_name("reproduce-tiny")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"measured/a": 0.5, "published/a": 0.25, "chance_1_in_1_000/a": 0.1}


def test_a_row_that_mlflow_refuses_has_failed_there(tiny: tuple[str, ...]) -> None:
    home(tiny).mkdir()
    with pytest.raises(tracking.TrackingError, match="a,b"):
        tracking_rows.log(home(tiny), "some", "row", "token", {"a,b": 1.0}, {}, "")
    client = MlflowClient(tracking.uri(home(tiny)))
    (run,) = client.search_runs([client.get_experiment_by_name("some").experiment_id])
    assert run.info.status == "FAILED"
    tracking_rows.log(home(tiny), "some", "row", "token", {"a": 1.0}, {}, "")
    found = client.search_runs([client.get_experiment_by_name("some").experiment_id])
    assert sorted(run.info.status for run in found) == ["FAILED", "FINISHED"], "a failed one is no reason to leave it"


@pytest.mark.parametrize("value", ["null", ""])
def test_no_home_is_the_default_one(value: str) -> None:
    assert home([f"data.home={value}"]) == config.default_home() == config.build("digits", ["data.home=null"]).home


def test_a_row_reaches_mlflow_with_our_settings(tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracking.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    measure.one("tiny", "counted", tiny, seeds=1)
    assert {name: os.environ[name] for name in tracking.SETTINGS} == tracking.SETTINGS


def test_a_row_whose_delivery_was_killed_does_not_stay_running(
    tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    home(tiny).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", lambda *_: None)
        tracking_rows.log(home(tiny), "some", "row", "token", {"a": 1.0}, {}, "")
    tracking_rows.log(home(tiny), "some", "row", "token", {"a": 1.0}, {}, "")
    client = MlflowClient(tracking.uri(home(tiny)))
    found = client.search_runs([client.get_experiment_by_name("some").experiment_id])
    assert sorted(run.info.status for run in found) == ["FINISHED", "KILLED"]


def test_a_run_whose_report_was_killed_is_reported_when_its_row_is_asked_for_again(
    tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*tiny, *SMALL, *MODEL)

    def killed(run: Run) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(stages, "report", killed)
        with pytest.raises(SystemExit):
            measure.one("tiny", "trained", words, seeds=1)
    (run,) = (home(tiny) / "runs").iterdir()
    assert tracking.is_running(run)
    measure.one("tiny", "trained", words, seeds=1)
    assert not tracking.is_running(run)
    assert (run / "report.html").is_file()


def test_a_row_is_one_run_in_mlflow_however_often_it_is_asked_for(tiny: tuple[str, ...]) -> None:
    for seeds in (1, 1, 2):
        measure.one("tiny", "counted", tiny, seeds)
    client = MlflowClient(tracking.uri(home(tiny)))
    experiment = client.get_experiment_by_name("reproduce-tiny")
    found = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.params["seeds"] for run in found) == ["1", "2"]


def test_a_record_names_the_code_that_measured_trained_and_scored(
    tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = ["first"]
    monkeypatch.setattr(environment, "commit", lambda: code[0])
    monkeypatch.setattr(summary, "trained_by", lambda run: "trained")

    def changing(setting: Setting) -> Measured:
        found = trained(setting)
        code[0] = "later"  # a commit while the row is measured
        return found

    monkeypatch.setitem(TABLES, "tiny", replace(TABLE, rows=(Row("trained", "trained", {}, "", changing, DIGITS),)))
    words = (*tiny, *SMALL, *MODEL)
    assert measure.one("tiny", "trained", words, seeds=1)["commit"] == "trained, first"
    for file in (home(tiny) / "reproduced").rglob("*.json"):
        file.unlink()
    assert measure.one("tiny", "trained", words, seeds=1)["commit"] == "trained, first, later"


def test_a_run_of_an_older_version_names_no_commit_of_its_own(
    tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*tiny, *SMALL, *MODEL)
    monkeypatch.setattr(environment, "commit", lambda: "now")
    (name,) = measure.one("tiny", "trained", words, seeds=1)["runs"]
    run = home(tiny) / "runs" / name
    (run / "environment.json").unlink()
    for file in (run / "scores").iterdir():
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "commit"}))
    for file in (home(tiny) / "reproduced").rglob("*.json"):
        file.unlink()
    assert measure.one("tiny", "trained", words, seeds=1)["commit"] == "now"


def test_a_record_names_the_hardware_that_trained(tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "trained_on", lambda run: "8 x Another")
    found = measure.one("tiny", "trained", (*tiny, *SMALL, *MODEL), seeds=1)
    assert found["hardware"] == f"8 x Another, {environment.hardware(environment.describe())}"


def test_only_the_splits_to_be_clustered_are(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "clustered", ("train",))
    seen = []

    def score(*arguments: Any) -> dict[str, float]:
        seen.append((len(arguments[1]), len(arguments[3])))
        return dict.fromkeys(clustering.NAMES.values(), 0.5)

    monkeypatch.setitem(EVALUATORS, "clustering", EVALUATORS["clustering"]._replace(score=score))
    setting = Digits(DIGITS, (*tiny, *SMALL, *MODEL), 0, tmp_path / "row")
    clustering._pixels("tiny_imagenet", setting)
    clustering._features("tiny_imagenet", setting)
    assert set(seen) == {(1412, 0)}
    assert len(seen) == 3  # pixels, which are the control of the other row, too; a discriminator, also at random init


def test_how_many_labels_a_draw_has_is_said(tiny: tuple[str, ...], tmp_path: Path) -> None:
    run = Digits(DIGITS, (*tiny, *SMALL, *MODEL), 0, tmp_path / "row").extracted("digits", ["svm_few_labels"])
    found = features(run, "svm_few_labels", {"few": "svm_few_labels/accuracy"})
    assert found.choices["labels per class"] == 5


def test_more_neighbours_than_a_draw_has_labels_are_refused_before_training(tmp_path: Path) -> None:
    setting = Setting(svhn.SVHN, (f"data.home={tmp_path}", "evaluate.neighbours=[1,2000]"), 0, tmp_path / "row")
    with pytest.raises(ValueError, match=r"evaluate\.neighbours=2000, but a draw has only 1000 labels"):
        svhn._on_features(svhn.KNN, setting)


def test_a_row_on_features_goes_on_with_the_bank_that_failed(
    tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Digits(DIGITS, (*tiny, *SMALL, *MODEL), 0, home(tiny) / "own")
    seen = []

    def score(train_x: np.ndarray, *_: Any) -> dict[str, float]:
        seen.append(train_x.mean())
        if len(seen) == 2:
            raise OSError("a full disk")
        return {f"tsvm/{name}": 0.25 * len(seen) for name in ("accuracy", "accuracy_std", "validation_accuracy", "c")}

    evaluator = svhn.TSVM._replace(score=score)
    with pytest.raises(OSError, match="a full disk"):
        svhn._on_features(evaluator, setting)
    found = svhn._on_features(evaluator, setting)
    assert seen[0] != seen[1] == seen[2]
    assert len(seen) == 4
    assert found.figures["error"].value == 0.75
    assert found.controls["random init"]["error"].value == 0.25
    assert found.controls["raw pixels"]["error"].value == 0.0
    assert found.choices["discriminator c"] == 0.25


def test_seeds_measured_with_other_code_are_said(tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "commit", lambda: "first")
    measure.one("tiny", "counted", tiny, seeds=1)
    monkeypatch.setattr(environment, "commit", lambda: "second")
    assert measure.one("tiny", "counted", tiny, seeds=2)["commit"] == "first, second"


def test_rows_compute_where_the_overrides_say(tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []

    def where(setting: Setting) -> Measured:
        seen.append(samples.device())
        return Measured({}, "")

    monkeypatch.setitem(TABLES, "tiny", replace(TABLE, rows=(Row("where", "where", {}, "", where, DIGITS),)))
    measure.one("tiny", "where", (*tiny, "compute.device=cpu"), seeds=1)
    measure.one("tiny", "where", (*tiny, "train.steps=7"), seeds=1)
    assert seen == ["cpu", "cuda"]


def test_other_code_is_reason_to_measure_anew(tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for code in ("a", "a", "b"):
        monkeypatch.setattr(measure, "_code", lambda *_, code=code: code)
        measure.one("tiny", "counted", tiny, seeds=1)
    assert len(list((home(tiny) / "reproduced" / "tiny" / "counted").rglob("call-*"))) == 2
    monkeypatch.undo()
    codes = {measure._code(table, presets) for table in ("svhn", "mnist") for presets in (("svhn",), ("mnist",))}
    assert len(codes) == 4
    named = measure._code("clustering", ("mnist",))
    monkeypatch.setattr(measure.inspect, "getsourcefile", lambda _: __file__)
    measure._code.cache_clear()
    assert measure._code("clustering", ("mnist",)) != named, "other images"
    measure._code.cache_clear()


def test_other_settings_are_measured_anew(tiny: tuple[str, ...]) -> None:
    measure.one("tiny", "counted", tiny, seeds=1)
    measure.one("tiny", "counted", (*tiny, "train.steps=7"), seeds=1)
    assert len(list((home(tiny) / "reproduced").rglob("call-*"))) == 2


def test_what_cannot_change_a_row_is_no_reason_to_measure_it_anew(tiny: tuple[str, ...]) -> None:
    """Another data set's source, added because its row asked for it; the order; what is computed where."""
    words = ("train.steps=7", "digits/train.batch_size=32")
    measure.one("tiny", "counted", (*tiny, *words), seeds=1)
    same = (*tiny, "imagenet32/data.source=x", *words[::-1], "data.offline=true", "compute.workers=0")
    measure.one("tiny", "counted", same, seeds=1)
    assert len(list((home(tiny) / "reproduced").rglob("call-*"))) == 1
    measure.one("tiny", "counted", (*same, "data.source=y"), seeds=1)
    measure.one("tiny", "counted", (*same, "train.steps=8"), seeds=1)
    assert len(list((home(tiny) / "reproduced").rglob("call-*"))) == 3


def test_a_row_uses_no_images_but_its_presets(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="images of mnist"):
        Setting(("cifar10",), (), 0, tmp_path).experiment("mnist")


def test_the_imagenet_row_is_scored_on_the_directory_given_for_cifar10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def extracted(self: Setting, preset: config.DataSet, protocols: Sequence[config.Protocol], *words: str) -> None:
        seen.append(self.experiment(preset, *words, protocols=protocols))
        raise KeyboardInterrupt

    monkeypatch.setattr(Setting, "extracted", extracted)
    (row,) = measure.choose("cifar10", ["dcgan_imagenet"])
    assert callable(row.measure)
    with pytest.raises(KeyboardInterrupt):
        row.measure(Setting(row.presets, (f"cifar10/data.source={tmp_path}",), 0, tmp_path))
    (experiment,) = seen
    assert experiment.evaluate.images == "cifar10"
    assert experiment.evaluate.images_source == str(tmp_path)
    assert experiment.data.source is None


@pytest.mark.parametrize("error", [MemoryError("of 5 GB"), torch.OutOfMemoryError("of 5 GB")])
def test_a_row_too_large_for_the_machine_says_so(
    tiny: tuple[str, ...], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(setting: Setting) -> Measured:
        raise error

    monkeypatch.setitem(TABLES, "tiny", replace(TABLE, rows=(Row("large", "large", {}, "", large, DIGITS),)))
    assert measure.one("tiny", "large", tiny, seeds=1)["reason"] == "not measured: of 5 GB"


def test_one_measurement_keeps_its_own_spread() -> None:
    one = Measured({"a": Figure(0.5, 0.1, "10 draws")}, "small")
    assert measure.together([one]) == one


def test_what_cannot_be_measured_says_why_without_the_home_and_stops_no_other(tiny: tuple[str, ...]) -> None:
    said: list[str] = []
    file = measure.reproduce("tiny", ["absent", "unstandardised", "counted"], tiny, say=said.append)
    found = record.read(file.parent, "tiny")
    assert found["absent"]["reason"] == "not measured: no photographs below HOME/x: give data.source"
    assert found["counted"]["figures"]["a"][0] == 0.5
    assert found["unstandardised"]["reason"] == ("not measured: L2-SVM 3 with C=1 has not come to its minimum: lower C")
    rows = ["counted", "absent", "unstandardised"]
    assert [line.removeprefix("tiny: ") for line in said[::2]] == rows
    assert said[1::2] == ["  accuracy, % 50.00", *(f"  {found[row]['reason']}" for row in rows[1:])]


def test_a_bug_is_no_reason(tiny: tuple[str, ...]) -> None:
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        measure.one("tiny", "broken", tiny, seeds=1)


def test_a_refusal_takes_no_measured_rows_place(tmp_path: Path) -> None:
    good: dict[str, Any] = {"figures": {"a": [1.0, None, ""]}}
    record.keep(tmp_path, "cifar10", {"x": good})
    record.keep(tmp_path, "cifar10", {"x": {"reason": "not measured: no data"}, "y": {"reason": "not measured: z"}})
    assert record.read(tmp_path, "cifar10") == {"x": good, "y": {"reason": "not measured: z"}}
    record.keep(tmp_path, "cifar10", {"y": good})
    assert record.read(tmp_path, "cifar10")["y"] == good


def test_what_is_kept_is_read_back(tiny: tuple[str, ...]) -> None:
    measured = Measured({"a": Figure(0.5, 0.1, "x")}, "s", {"c": {"a": Figure(0.2)}}, {"c": 1.0}, ("run",))
    content = json.loads(json.dumps({**measured.__dict__}))
    assert record.measured(content) == measured


@pytest.mark.parametrize(
    ("names", "overrides", "match"),
    [
        ([], ("train.seed=7",), r"train.seed=7: .* seeds 0 to N - 1 of --seeds N"),
        ([], ("digits/evaluate.seed=7",), r"digits/evaluate.seed=7: .* --seeds N"),
        (["contrived"], (), "no row 'contrived', did you mean counted"),
        (["quoted"], (), "quoted: not measured: another model"),
        ([], ("train.step=1",), "unknown key 'train.step', did you mean train.steps"),
        ([], ("cifar1/train.steps=1",), "'cifar1' is no preset, did you mean cifar10"),
        ([], ("mnist/data.home=elsewhere",), "one home and one device for everything: give data.home=elsewhere"),
        ([], ("mnist/compute.device=cpu",), "give compute.device=cpu"),
        ([], ("train.steps",), "not of the form"),
        ([], ("train.steps=0",), "train.steps=0"),
        ([], ("mnist/train.steps=0",), "train.steps=0"),
        ([], ("mnist/data.source=https://me:secret@host/mnist",), "data.source: an address at host with a user"),
        ([], ("data.source=https://me:secret@host/mnist",), "data.source: an address at host with a user"),
        ([], ("data.source=https://me:secret@host/x", "mnist/data.source=d"), "data.source: an address at host with"),
    ],
)
def test_refused_before_any_work(tiny: tuple[str, ...], names: list[str], overrides: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match) as refused:
        measure.reproduce("tiny", names, (*tiny, *overrides))
    assert "secret" not in str(refused.value)
    assert not home(tiny).exists()


def test_no_seed_is_refused(tiny: tuple[str, ...]) -> None:
    for function in (measure.one, measure.reproduce):
        with pytest.raises(ValueError, match="seeds=0"):
            function("tiny", "counted" if function is measure.one else ["counted"], tiny, 0)  # type: ignore[operator]


def test_a_value_that_one_data_set_takes_is_no_mistake(tiny: tuple[str, ...]) -> None:
    check(["data.category=church_outdoor"])  # LSUN's
    with pytest.raises(ValueError, match=r"data\.category"):
        check(["mnist/data.category=church_outdoor"])


def test_an_unknown_table_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown table 'imdb'; tables are cifar10, svhn"):
        measure.choose("imdb", [])


def test_an_override_for_one_data_set_is_for_it_alone(tmp_path: Path) -> None:
    words = ("cifar10/train.steps=7", "train.batch_size=16", "mnist/data.source=/a=b/c")
    setting = Setting(("cifar10", "mnist"), words, 3, tmp_path)
    assert setting.experiment("cifar10").train.steps == 7
    assert setting.experiment("cifar10").data.source is None
    assert setting.experiment("mnist").train.steps != 7
    assert setting.experiment("mnist").data.source == "/a=b/c"
    assert {setting.experiment(name).train.batch_size for name in ("mnist", "cifar10")} == {16}
    assert setting.experiment("mnist").train.seed == setting.experiment("mnist").evaluate.seed == 3
    assert setting.experiment("cifar10", "train.steps=5").train.steps == 7  # the user's word is the last


def test_a_trained_row_has_controls_choices_and_the_rule_by_which_its_checkpoint_was_chosen(
    tiny: tuple[str, ...],
) -> None:
    found = measure.one("tiny", "trained", (*tiny, *SMALL, *MODEL), seeds=1)
    assert set(found["controls"]) == {"random init", "raw pixels"}
    assert set(found["figures"]) == set(found["controls"]["raw pixels"]) == {"a", "b"}
    assert "lowest sliced Wasserstein distance" in found["choices"]["checkpoint"]
    assert found["choices"]["discriminator svm/c"] > 0
    assert found["choices"]["raw_pixels knn/neighbours"] >= 1
    assert re.search(r"trained 4 steps of 32 \(0\.1 epochs of 1,412 images\) in 0\.\d min", found["scale"])
    assert "200 labels" in found["scale"]
    (name,) = found["runs"]
    assert (home(tiny) / "runs" / name / "experiment.json").is_file()


def test_generated_digits_are_neighbours_in_any_number_of_the_same_nets(
    tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "FEWER", (20, 40, 60))
    monkeypatch.setattr(mnist, "COMPARED", 30)
    monkeypatch.setattr(mnist, "arrays", with_validation)
    setting = Digits(DIGITS, (*tiny, *SMALL, *GENERATING), 0, home(tiny) / "table" / "row" / "work")
    found = mnist._drawn(60, setting)

    (run,) = setting.runs.values()
    assert run.experiment.model.conditional
    _, held_out, test = with_validation(run.store())

    def error(step: int, count: int, real: Labelled) -> float:
        generator = checkpoint.load_generator(run.checkpoints / str(step))
        ((x, y),) = sampling.sampled(generator, run.experiment.model, 10, count, 0, torch.device("cpu"))
        nearest = KNeighborsClassifier(1, algorithm="brute").fit(x.reshape(count, -1).astype(float), y)
        return float(1 - nearest.score(real[0].reshape(len(real[0]), -1).astype(float), real[1]))

    lowest, step = min((error(step, 30, held_out), step) for step in checkpoint.steps(run))
    assert found.figures == {"error": (pytest.approx(error(step, 60, test)), None, "")}
    assert found.controls == {
        f"the first {n} of them": {"error": (pytest.approx(error(step, n, test)), None, "")} for n in (20, 40)
    }
    assert found.scale.endswith("; 60 digits drawn")
    assert found.choices == {"checkpoint": f"step {step}, {mnist.CHOSEN.format(10)}, {lowest:.2%}"}
    assert found.runs == (run.name,)


def with_validation(store: Store) -> tuple[Labelled, Labelled, Labelled]:
    """Half of the test images as those held out."""
    train, test = ((store.images(split), store.labels(split)) for split in ("train", "test"))
    return train, (test[0][::2], test[1][::2]), (test[0][1::2], test[1][1::2])


GENERATING = (
    *("digits/model.width=4", "digits/model.hidden=8", "digits/train.steps=30", "digits/train.checkpoint_every=3"),
    "digits/train.keep=10",
)


def test_no_image_or_label_of_test_changes_which_generator_is_chosen(
    tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "COMPARED", 100)
    chosen, errors = set(), set()
    for digit in range(10):

        def all_one(store: Store, digit: int = digit) -> tuple[Labelled, Labelled, Labelled]:
            train, held_out, (x, y) = with_validation(store)
            return train, held_out, (x[digit:], np.full_like(y[digit:], digit))

        monkeypatch.setattr(mnist, "arrays", all_one)
        setting = Digits(DIGITS, (*tiny, *SMALL, *GENERATING), 0, home(tiny) / f"table {digit}" / "row" / "work")
        found = mnist._drawn(100, setting)
        chosen.add(str(found.choices))
        errors.add(found.figures["error"].value)
    assert len(chosen) == 1 < len(errors)


def test_rows_of_the_same_nets_share_the_choice_and_interruptions_do_not_change_it(
    tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "COMPARED", 100)
    monkeypatch.setattr(mnist, "arrays", with_validation)
    words, scored = (*tiny, *SMALL, *GENERATING), []
    score = mnist._score
    monkeypatch.setattr(mnist, "_score", lambda run, step, *rest: scored.append(step) or score(run, step, *rest))
    found = [
        mnist._drawn(100, Digits(DIGITS, words, 0, home(tiny) / "table" / row / "work")).choices for row in ("a", "b")
    ]
    assert found[0] == found[1]
    assert len(scored) == 12, "ten checkpoints once, and what is reported twice"
    (run,) = (home(tiny) / "runs").iterdir()
    shutil.copytree(run / "checkpoints" / "3", run / "checkpoints" / "4")  # as SIGTERM leaves one
    again = mnist._drawn(100, Digits(DIGITS, words, 0, home(tiny) / "another table" / "a" / "work"))
    assert again.choices == found[0]
    assert 4 not in scored


@pytest.mark.parametrize("conditional", [False, True])
def test_image_quality_is_that_of_images_drawn_with_or_without_labels(
    tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, conditional: bool
) -> None:
    """The scores themselves, which need weights of 90 MB, are tested in test_image_quality.py."""
    compared: list[np.ndarray] = []

    def score(drawn: np.ndarray, reference: np.ndarray, *_: Any) -> dict[str, float]:
        compared.extend((drawn, reference))
        return {f"image_quality/{column.key}": 1.0 for column in image_quality.TABLE.columns}

    monkeypatch.setattr(image_quality, "COUNT", 1030)
    monkeypatch.setattr(inception, "load", lambda *_: None)
    monkeypatch.setattr(image_quality, "_calibration", lambda *_: {"inception_score": 11.2})
    monkeypatch.setattr(inception, "score", score)
    words = (*tiny, *SMALL, "digits/model.width=4", f"evaluate.inception={tmp_path / 'weights'}")
    (row,) = measure.choose("image_quality", ["conditional" if conditional else "unconditional"])
    setting = Digits(DIGITS, words, 0, home(tiny) / "row")
    assert callable(row.measure)
    found = row.measure(setting)

    (run,) = setting.runs.values()
    assert run.experiment.model.conditional is conditional
    drawn, reference = compared
    assert drawn.shape == (1030, *reference.shape[1:])
    assert drawn.dtype == np.uint8
    assert found.figures["fid"].value == 1.0
    assert "1,030 images drawn" in found.scale


def test_a_row_of_image_quality_is_of_its_own_model(tiny: tuple[str, ...], tmp_path: Path) -> None:
    for name, other in (("conditional", "false"), ("unconditional", "true")):
        found = measure.one("image_quality", name, (*tiny, f"model.conditional={other}"), seeds=1)
        assert re.search(r"model\.conditional=\w+ is what this row is of", found["reason"])


def test_weights_are_calibrated_once_for_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, calls = tmp_path / "weights", []
    weights.write_bytes(b"weights")

    def calibrate(*_: Any) -> dict[str, Any]:
        calls.append(1)
        return {"weights_sha256": storage.sha256(weights), "inception_score": 11.2, "inception_score_std": 0.1}

    monkeypatch.setattr(inception, "calibrate", calibrate)
    for row in ("conditional", "unconditional"):
        setting = Setting(("cifar10",), (), 0, tmp_path / "image_quality" / row / "0")
        image_quality._calibration(setting, np.zeros(0), weights)
    assert len(calls) == 1


def test_draws_of_svhn_are_the_rows_own_unless_the_user_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []

    def score(*arguments: Any) -> dict[str, float]:
        draws.append(arguments[4].draws)
        assert [len(part) for part in arguments[5]] == [4, 4], "validation, on which everything is chosen"
        return {f"knn_few_labels/{name}": 0.5 for name in ("accuracy", "accuracy_std", "validation_accuracy")}

    knn = svhn.KNN._replace(score=score)
    monkeypatch.setattr(Store, "scored", ("train", "test", "validation"))
    monkeypatch.setattr(Store, "images", lambda *_: np.zeros((4, 1, 2, 2), np.uint8))
    monkeypatch.setattr(Store, "labels", lambda *_: np.zeros(4, np.int64))
    for own in ((), ("digits/evaluate.draws=3",)):
        setting = Digits(DIGITS, (f"data.home={home}", "compute.workers=0", *own), 0, home / "row")
        found = svhn._in_pixels(knn, setting)
    assert draws == [10, 3]
    assert found.figures["error"].of == "3 draws"


def test_the_svm_on_svhn_gives_errors_with_their_interval(tiny: tuple[str, ...], tmp_path: Path) -> None:
    found = svhn._svm(Digits(DIGITS, (*tiny, *SMALL, *MODEL), 0, tmp_path / "row"))
    (run,) = (Run.open(home(tiny) / "runs" / name) for name in found.runs)
    scores = run.scores()["svm_few_labels"]["scores"]
    for source, figures in (("discriminator", found.figures), ("raw_pixels", found.controls["raw pixels"])):
        values = scores[source]
        spread = 1.96 * values["svm_few_labels/accuracy_std"]
        expected = Figure(1 - values["svm_few_labels/accuracy"], spread, "10 draws, 1.96 deviations")
        assert figures["error"] == expected
        assert figures["validation"] == Figure(1 - values["svm_few_labels/validation_accuracy"])


class Planned(Setting):
    """Says which experiment a row would train."""

    def trained(self, preset: config.DataSet, *words: str, protocols: Sequence[config.Protocol] = ()) -> Run:
        raise LookupError(self.experiment(preset, *words, protocols=protocols))


@pytest.mark.parametrize(
    ("work", "presets", "expected"),
    [
        (cifar10._of_itself, ("cifar10",), {"model.kernel": 3, "evaluate.labels": 0, "train.steps": 12_000}),
        (
            cifar10._of_imagenet,
            ("imagenet32", "cifar10"),
            {"model.kernel": 3, "model.width": 128, "model.z_dim": 256, "evaluate.images": "cifar10"},
        ),
        (
            partial(mnist._drawn, 10),
            ("mnist",),
            {
                **{
                    "model.conditional": True,
                    "model.hidden": 1024,
                    "model.affine": False,
                    "train.weight_decay": 2.5e-5,
                },
                **{"train.decay": 0.5, "train.ema": 0.999, "train.keep": 20, "train.steps": 20_000},
            },
        ),
    ],
)
def test_a_row_trains_the_net_that_its_table_says(
    tmp_path: Path, work: Any, presets: tuple[config.DataSet, ...], expected: dict[str, Any]
) -> None:
    with pytest.raises(LookupError) as planned:
        work(Planned(presets, (f"data.home={tmp_path}",), 0, tmp_path))
    given = planned.value.args[0].model_dump()
    assert {key: given[key.split(".")[0]][key.split(".")[1]] for key in expected} == expected


def test_a_supervised_row_searches_on_what_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 256, (3, 32, 32), np.uint8), i % 10) for i in range(60)]
    about = Description("svhn", tuple("0123456789"), 32, 3, "none")
    store = write_store(tmp_path, about, {"train": pairs, "validation": pairs[:20], "test": pairs[20:30]})
    monkeypatch.setattr(svhn, "TRIALS", 2)
    monkeypatch.setattr(Setting, "images", lambda self, *words: (store, self.experiment(*words).evaluate))
    words = (f"data.home={tmp_path}", "model.width=2", "evaluate.labels_per_class=5", "compute.workers=0")
    setting = Setting(svhn.SVHN, words, 0, tmp_path / "row")
    found = svhn._supervised(setting)
    assert found.scale == "2 trials; 50 labels"
    assert 0 <= found.figures["error"].value <= 1
    assert found.choices["trial"] in (0, 1)
    assert len(list((tmp_path / "row").glob("*.json"))) == 2, "each trial is kept"
    with samples.computing_on("cpu"):
        searching = svhn._search(replace(setting, overrides=words[:-1]))
    assert isinstance(searching, partial)
    assert (searching.func, searching.keywords["gpus"]) == (cluster_search.search, 0)


def test_real_digits_are_as_many_as_the_row_says(tiny: tuple[str, ...], tmp_path: Path) -> None:
    setting = Digits(DIGITS, tiny, 0, tmp_path / "row")
    store, _ = setting.images("mnist")
    flat = [store.images(split).reshape(store.count(split), -1).astype(np.float64) for split in ("train", "test")]
    labels = [store.labels(split) for split in ("train", "test")]
    expected = 1 - KNeighborsClassifier(1, algorithm="brute").fit(flat[0][:30], labels[0][:30]).score(
        flat[1], labels[1]
    )
    assert mnist._real(30, setting).figures["error"].value == pytest.approx(expected)


def test_a_search_without_ray_goes_on_where_it_stopped(tmp_path: Path) -> None:
    done = []

    def function(trial: dict[str, Any]) -> dict[str, Any]:
        if trial["number"] == 2 and len(done) == 2:
            raise KeyboardInterrupt
        done.append(trial["number"])
        return {"error": trial["number"] / 10}

    trials = [{"number": number} for number in range(4)]
    with pytest.raises(KeyboardInterrupt):
        list(svhn._one_by_one(tmp_path, function, trials))
    done.append(-1)
    assert list(svhn._one_by_one(tmp_path, function, trials)) == [{"error": n / 10} for n in range(4)]
    assert done == [0, 1, -1, 2, 3]


def test_the_page_shows_published_measured_controls_and_reasons(tiny: tuple[str, ...], tmp_path: Path) -> None:
    file = measure.reproduce("tiny", ["counted", "absent"], tiny, results=tmp_path / "docs")
    text = file.read_text()
    assert file == tmp_path / "docs" / "results.md"
    assert "| method | accuracy, %: published | accuracy, %: measured | error: measured |" in text
    assert "| counted | 25.00 ± 1.00 | **50.00** | **-** |" in text
    assert "| - chance, 1 in 1,000 |  | 10.00 | - |" in text
    assert "| absent |  | not measured | not measured |" in text
    assert "- **absent**: not measured: no photographs below HOME/x: give data.source." in text
    assert "| quoted | 75.00 | not measured | not measured |" in text
    assert "- **unstandardised**, **broken**, **trained**: not measured: not run yet." in text
    assert f"`dcgan reproduce tiny counted {tiny[0]}`" in text
    assert "- **counted**: seed 0; 1 seed; the command took" in text
    for table in reproduce.TABLES.values():
        assert f"## {table.title}\n" in text


@given(st.text(), st.text())
def test_what_else_stands_on_a_page_stays(before: str, tables: str) -> None:
    once = page.replace(before, "first")
    again = page.replace(once, tables)
    assert page.replace(again, "first") == once or page.END in tables
    assert before.rstrip() in once
    assert once.count(page.BEGIN) == 1 or page.BEGIN in before


def test_text_after_the_tables_stays_after_them() -> None:
    text = f"# A\n\n{page.BEGIN}\nold\n{page.END}\n\n## B\n"
    assert page.replace(text, "new") == f"# A\n\n{page.BEGIN}\n\nnew\n{page.END}\n\n## B\n"


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_whole(name: str) -> None:
    table = TABLES[name]
    columns = {column.key for column in table.columns}
    keys = [row.key for row in table.rows]
    assert len(keys) == len(set(keys))
    for row in table.rows:
        assert set(row.published) <= columns
        assert bool(row.published) == bool(row.source), "a published figure has a source, and only such a one"
        assert callable(row.measure) or row.measure.startswith("not measured: ")
        assert callable(row.measure) == bool(row.presets)
    assert measure.choose(name, [])


def test_published_figures_are_those_of_the_paper() -> None:
    """Table 1 of Radford et al.: accuracy, and with 400 labels per class; table 2 stands in two places, as an error."""
    published = {row.key: row.published for row in TABLES["cifar10"].rows if row.source == PAPER}
    assert {key: (row["accuracy"].value, *row["few"][:2]) for key, row in published.items()} == {
        "patch_kmeans_4800": (0.806, 0.637, 0.007),
        "kmeans_3_layers": (0.820, 0.707, 0.007),
        "view_invariant": (0.819, 0.726, 0.007),
        "exemplar_cnn": (0.843, 0.774, 0.002),
        "dcgan_imagenet": (0.828, 0.738, 0.004),
    }
    (svm,) = (row for row in TABLES["svhn"].rows if row.key == "dcgan_svm")
    assert 1 - svm.published["error"].value == pytest.approx(PUBLISHED["svhn"]["svm_few_labels/accuracy"].value)


def test_test_labels_decide_no_choice(tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffled test labels change accuracies on test and nothing that is chosen, checkpoint included."""
    overrides = (*tiny, *SMALL, *MODEL)
    protocols: list[config.Protocol] = ["svm", "svm_few_labels", "knn"]
    run = Setting(DIGITS, overrides, 0, home(tiny)).extracted("digits", protocols, "evaluate.draws=2")
    chosen, accuracy = _chosen(run)
    honest = type(run.store()).labels

    def shuffled(self: Any, *splits: str) -> Any:
        labels = honest(self, *splits)
        return labels if splits != ("test",) else (labels + 1) % len(self.classes)

    monkeypatch.setattr(type(run.store()), "labels", shuffled)
    shutil.rmtree(run.path / "scores")
    shutil.rmtree(home(tiny) / "scores")
    assert _chosen(run)[0] == chosen
    assert all(now < before for now, before in zip(_chosen(run)[1], accuracy, strict=True))
    other = home(tiny).with_name("other")
    again = Setting(DIGITS, (f"data.home={other}", *overrides[1:]), 0, other).extracted(
        "digits", protocols, "evaluate.draws=2"
    )
    assert checkpoint.chosen(again).name == checkpoint.chosen(run).name, "trained and chosen beside those labels"
    assert _chosen(again)[0] == chosen


def _chosen(run: Any) -> tuple[dict[str, float], list[float]]:
    scores = {p: stages.evaluate(run, p)["discriminator"] for p in ("svm", "svm_few_labels", "knn")}
    values = {name: value for found in scores.values() for name, value in found.items()}
    tested = {f"{protocol}/accuracy" for protocol in scores} | {"svm_few_labels/accuracy_std"}
    return {name: value for name, value in values.items() if name not in tested}, [
        values[f"{protocol}/accuracy"] for protocol in scores
    ]


def test_overrides_are_checked_without_a_table() -> None:
    check(["train.steps=1", "svhn/data.source=x"])
