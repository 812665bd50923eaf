"""The flow reproduce on a real Prefect server and a real MLflow record: a measured row, a refused one, the page."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.testing.utilities import prefect_test_harness

from dcgan import tracking
from dcgan.reproduce import TABLES
from dcgan.reproduce.rows import Column, Figure, Measured, Row, Setting, Table, features
from flows.reproduce import reproduce

pytestmark = pytest.mark.slow

SMALL = [
    *("digits/train.steps=4", "digits/train.batch_size=16", "train.checkpoint_every=4", "train.sample_every=4"),
    *("digits/model.width=4", "compute.workers=0", "evaluate.labels=100"),
]


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


def measured(setting: Setting) -> Measured:
    return features(setting.extracted("digits", ["svm"]), "svm", {"accuracy": "svm/accuracy"})


def refused(setting: Setting) -> Measured:
    raise FileNotFoundError("no images: give mnist/data.source=DIRECTORY")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits in the place of a table whose data no test has."""
    rows = (
        Row("digits", "digits", {"accuracy": Figure(0.9)}, "Nobody", measured, ("digits",)),
        Row("no", "none", {}, "", refused, ("mnist",)),
    )
    monkeypatch.setitem(TABLES, "mnist", Table("MNIST", (Column("accuracy", "accuracy, %", percent=True),), rows))


def test_a_table_is_measured_shown_and_delivered(home: Path, tiny: None) -> None:
    given = [*SMALL, f"data.home={home}"]
    state = reproduce("mnist", overrides=given, return_state=True)

    assert state.is_completed(), state.message
    result = state.result()
    value, *_ = result["rows"]["digits"]["figures"]["accuracy"]
    assert result["rows"]["no"]["reason"] == "not measured: no images: give mnist/data.source=DIRECTORY"
    page = Path(result["page"]).read_text()
    assert f"| digits | 90.00 | **{100 * value:.2f}** |" in page
    assert "| - random init |" in page

    with get_client(sync_client=True) as client:
        key = ArtifactFilter(key=ArtifactFilterKey(any_=["reproduce-mnist"]))
        (artifact,) = client.read_artifacts(artifact_filter=key)
        flow_run = client.read_flow_run(artifact.flow_run_id)
    assert flow_run.name == " ".join(["mnist", *given])
    assert f"**{100 * value:.2f}**" in str(artifact.data)

    mlflow = MlflowClient(tracking.uri(home))
    experiment = mlflow.get_experiment_by_name("reproduce-mnist")
    (row,) = mlflow.search_runs([experiment.experiment_id])
    assert row.info.run_name == "digits"
    assert row.info.status == "FINISHED"
    assert row.data.metrics["measured/accuracy"] == value
    assert row.data.metrics["published/accuracy"] == 0.9
    assert {"random_init/accuracy", "raw_pixels/accuracy"} <= set(row.data.metrics)
    assert row.data.params["command"].startswith("dcgan reproduce mnist digits ")
    (name,) = result["rows"]["digits"]["runs"]
    assert row.data.params["runs"] == name
    assert "lowest sliced Wasserstein distance" in row.data.params["chosen.checkpoint"]

    experiment = mlflow.get_experiment_by_name("digits")
    (run,) = mlflow.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (name, "FINISHED")
    assert run.data.metrics["svm/accuracy"] == value
    assert "report.html" in [file.path for file in mlflow.list_artifacts(run.info.run_id)]


def test_a_run_whose_row_fails_after_training_has_failed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(setting: Setting) -> Measured:
        setting.trained("digits")
        raise ValueError("the test labels are missing")

    row = Row("digits", "digits", {}, "", fails, ("digits",))
    monkeypatch.setitem(TABLES, "mnist", Table("MNIST", (Column("accuracy", "accuracy, %"),), (row,)))
    reproduce("mnist", overrides=[*SMALL, "train.batch_size=15", f"data.home={home}"])
    mlflow = MlflowClient(tracking.uri(home))
    experiment = mlflow.get_experiment_by_name("digits")
    (run,) = mlflow.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"


def test_an_unreachable_mlflow_costs_the_row_nothing(home: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = reproduce("mnist", ["digits"], [*SMALL, f"data.home={home}"])
    assert result["rows"]["digits"]["figures"]


def test_a_wrong_word_stops_the_flow_before_it_starts_anything(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for rows, words in ((["svn"], []), ([], ["train.step=1"])):
        state = reproduce("svhn", rows, [*words, f"data.home={home}"], return_state=True)
        assert state.is_failed()
    assert not home.exists()
