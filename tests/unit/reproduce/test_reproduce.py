"""Rows of a table: measured once a seed, kept, shown beside what was published; what can't be measured says why."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from sklearn.neighbors import KNeighborsClassifier

from dcgan import checkpoint, config, reproduce, sampling, stages, tracking, tracking_rows
from dcgan.evaluate.samples import NotConvergedError
from dcgan.reproduce import TABLES, image_quality, measure, mnist, page, record
from dcgan.reproduce.rows import Column, Figure, Measured, Row, Setting, Table, check, features, home, merged

SMALL = ("digits/train.steps=4", "digits/train.checkpoint_every=2", "digits/train.batch_size=32", "compute.workers=0")
MODEL = ("digits/model.width=4", "digits/evaluate.labels=200", "digits/evaluate.labels_per_class=5")


def counted(setting: Setting) -> Measured:
    """How often it was called with which seed is left in its directory."""
    setting.directory.mkdir(parents=True, exist_ok=True)
    (setting.directory / f"call-{len(list(setting.directory.iterdir()))}").touch()
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
    run = setting.extracted("digits")
    return merged(features(run, "svm", {"a": "svm/accuracy"}), features(run, "knn", {"b": "knn/accuracy"}))


class Digits(Setting):
    """scikit-learn's digits in the place of any data set."""

    def experiment(self, preset: config.DataSet, *words: str) -> config.Experiment:
        return super().experiment("digits", *words)


TABLE = Table(
    "Tiny",
    (Column("a", "accuracy, %", percent=True), Column("b", "error", better="lower")),
    (
        Row("counted", "counted", {"a": Figure(0.25, 0.01)}, "Someone, 2015", counted),
        Row("absent", "absent", {}, "", without_data),
        Row("unstandardised", "unstandardised", {}, "", unstandardised),
        Row("broken", "broken", {}, "", broken),
        Row("quoted", "quoted", {"a": Figure(0.75)}, "Someone, 2015", "not measured: another model"),
        Row("trained", "trained", {}, "", trained),
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
        tracking_rows.log(home(tiny), "some", "row", {"a,b": 1.0}, {}, "")
    client = MlflowClient(tracking.uri(home(tiny)))
    (run,) = client.search_runs([client.get_experiment_by_name("some").experiment_id])
    assert run.info.status == "FAILED"


def test_other_settings_are_measured_anew(tiny: tuple[str, ...]) -> None:
    measure.one("tiny", "counted", tiny, seeds=1)
    measure.one("tiny", "counted", (*tiny, "train.steps=7"), seeds=1)
    assert len(list((home(tiny) / "reproduced").rglob("call-*"))) == 2


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
        ([], ("train.steps",), "not of the form"),
    ],
)
def test_refused_before_any_work(tiny: tuple[str, ...], names: list[str], overrides: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        measure.reproduce("tiny", names, (*tiny, *overrides))
    assert not list((home(tiny)).rglob("call-*"))


def test_an_unknown_table_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown table 'imdb'; tables are cifar10, svhn"):
        measure.choose("imdb", [])


def test_an_override_for_one_data_set_is_for_it_alone(tmp_path: Path) -> None:
    setting = Setting(("cifar10/train.steps=7", "train.batch_size=16", "mnist/data.source=/a=b/c"), 3, tmp_path)
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
    assert "trained 4 steps of 32" in found["scale"]
    assert "200 labels" in found["scale"]
    (name,) = found["runs"]
    assert (home(tiny) / "runs" / name / "experiment.json").is_file()


def test_generated_digits_are_neighbours_in_any_number_of_the_same_nets(
    tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "FEWER", (20, 40, 60))
    setting = Digits((*tiny, *SMALL, "digits/model.width=4", "digits/model.hidden=8"), 0, home(tiny) / "row")
    found = mnist._drawn(60, setting)

    (run,) = setting.runs.values()
    assert run.experiment.model.conditional
    generator = checkpoint.load_generator(checkpoint.chosen(run))
    ((x, y),) = sampling.sampled(generator, run.experiment.model, 10, 60, 0, torch.device("cpu"))
    images, labels = run.store().images("test"), run.store().labels("test")

    def error(count: int) -> Any:
        nearest = KNeighborsClassifier(1, algorithm="brute").fit(x[:count].reshape(count, -1).astype(float), y[:count])
        return pytest.approx(1 - nearest.score(images.reshape(len(images), -1).astype(float), labels))

    assert found.figures == {"error": (error(60), None, "")}
    assert found.controls == {f"the first {n} of them": {"error": (error(n), None, "")} for n in (20, 40)}
    assert found.scale.endswith("; 60 digits drawn")
    assert found.choices == {"checkpoint": "step 4, the newest checkpoint"}
    assert found.runs == (run.name,)


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
    monkeypatch.setattr(image_quality.image_quality, "load", lambda *_: None)
    monkeypatch.setattr(image_quality, "_calibration", lambda *_: {"inception_score": 11.2})
    monkeypatch.setattr(image_quality.image_quality, "score", score)
    words = (*tiny, *SMALL, "digits/model.width=4", f"evaluate.inception={tmp_path / 'weights'}")
    (row,) = measure.choose("image_quality", ["conditional" if conditional else "unconditional"])
    setting = Digits(words, 0, home(tiny) / "row")
    assert callable(row.measure)
    found = row.measure(setting)

    (run,) = setting.runs.values()
    assert run.experiment.model.conditional is conditional
    drawn, reference = compared
    assert drawn.shape == (1030, *reference.shape[1:])
    assert drawn.dtype == np.uint8
    assert found.figures["fid"].value == 1.0
    assert "1,030 images drawn" in found.scale


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
    assert "- **trained**: not measured: not run yet." in text
    assert f"`dcgan reproduce tiny counted {tiny[0]}`" in text
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
    assert measure.choose(name, [])


def test_published_figures_are_those_of_the_reports(tmp_path: Path) -> None:
    """The same figures stand in `evaluate.published`, for the page of a run."""
    from dcgan.evaluate.published import PUBLISHED

    rows = {name: {row.key: row.published for row in table.rows} for name, table in TABLES.items()}
    assert rows["cifar10"]["dcgan_imagenet"]["accuracy"].value == PUBLISHED["cifar10"]["svm/accuracy"].value
    assert rows["cifar10"]["dcgan_imagenet"]["few"].value == PUBLISHED["cifar10"]["svm_few_labels/accuracy"].value
    error = rows["svhn"]["dcgan_svm"]["error"].value
    assert 1 - error == pytest.approx(PUBLISHED["svhn"]["svm_few_labels/accuracy"].value)


def test_test_labels_decide_no_choice(tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffled test labels change accuracies on test and nothing that is chosen, checkpoint included."""
    overrides = (*tiny, *SMALL, *MODEL)
    setting = Setting(overrides, 0, home(tiny))
    run = setting.extracted("digits", "evaluate.draws=2")
    chosen, accuracy = _chosen(run)
    honest = type(run.store()).labels

    def shuffled(self: Any, *splits: str) -> Any:
        labels = honest(self, *splits)
        return labels if splits != ("test",) else (labels + 1) % len(self.classes)

    monkeypatch.setattr(type(run.store()), "labels", shuffled)
    for file in (run.path / "scores").iterdir():
        file.unlink()
    assert _chosen(run)[0] == chosen
    assert all(now < before for now, before in zip(_chosen(run)[1], accuracy, strict=True))


def _chosen(run: Any) -> tuple[dict[str, float], list[float]]:
    scores = {p: stages.evaluate(run, p)["discriminator"] for p in ("svm", "svm_few_labels", "knn")}
    values = {name: value for found in scores.values() for name, value in found.items()}
    tested = {f"{protocol}/accuracy" for protocol in scores} | {"svm_few_labels/accuracy_std"}
    return {name: value for name, value in values.items() if name not in tested}, [
        values[f"{protocol}/accuracy"] for protocol in scores
    ]


def test_overrides_are_checked_without_a_table() -> None:
    check(["train.steps=1", "svhn/data.source=x"])
