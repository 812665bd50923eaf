"""The flow train-eval on a real Prefect server: all stages, the artifact, and how it goes on after a failure."""

import base64
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.testing.utilities import prefect_test_harness

from dcgan import config, stages
from dcgan.run import Run
from dcgan.tracking_ledger import Ledger
from flows.train_eval import train_eval

pytestmark = pytest.mark.slow

SMALL = [
    *("train.steps=4", "train.batch_size=16", "train.log_every=1", "train.checkpoint_every=4", "train.sample_every=4"),
    *("model.width=4", "compute.workers=0", "evaluate.labels=100", "evaluate.draws=2", "evaluate.restarts=1"),
]


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


def words(home: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.home={home}", *more]


def test_all_stages_then_an_artifact_and_a_second_run_trains_nothing(home: Path) -> None:
    state = train_eval("digits", words(home), return_state=True)

    assert state.is_completed(), state.message
    result = state.result()
    run = Run.open(Path(result["run"]))
    assert set(result["scores"]) == set(config.PROTOCOLS) == set(run.scores())
    assert set(result["scores"]["svm"]) == {"discriminator", "random_init", "raw_pixels"}
    assert (run.path / "report.html").is_file()
    assert Ledger.load(run.path / "mlflow.json").status == "FINISHED"
    assert_artifact(run, result["scores"])

    before = {path: path.stat().st_mtime_ns for path in (run.path / "metrics.jsonl", *run.checkpoints.iterdir())}
    assert train_eval("digits", words(home))["scores"] == result["scores"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_flow_run_that_another_process_trains_leaves_its_mlflow_run_alone(home: Path) -> None:
    run = stages.ingest(config.build("digits", words(home, "train.seed=2")))
    with run.claim():
        state = train_eval("digits", words(home, "train.seed=2"), return_state=True)
    assert state.is_failed()
    assert "is being written by process" in str(state.message)
    assert not (run.path / "mlflow.json").exists()


def assert_artifact(run: Run, scores: dict[str, Any]) -> None:
    with get_client(sync_client=True) as client:
        key = ArtifactFilter(key=ArtifactFilterKey(any_=["train-eval-digits"]))
        (artifact,) = client.read_artifacts(artifact_filter=key)
        flow_run = client.read_flow_run(artifact.flow_run_id)
    text = str(artifact.data)
    assert flow_run.name == " ".join(["digits", *flow_run.parameters["overrides"]])
    assert run.name in text
    for source in scores["knn"].values():
        assert f"{source['knn/accuracy']:.4g}" in text
    (grid,) = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
    assert base64.b64decode(grid) == max(run.samples.glob("*.png")).read_bytes()


def test_flow_that_failed_in_evaluate_goes_on_without_training_again_and_without_mlflow(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stages.ingest(config.build("digits", words(home, "train.seed=1")))
    obstacle = run.path / "scores" / "knn.json"
    obstacle.mkdir(parents=True)

    state = train_eval("digits", words(home, "train.seed=1"), return_state=True)

    assert state.is_failed()
    assert "knn.json" in state.message
    assert Ledger.load(run.path / "mlflow.json").status == "FAILED"
    before = (run.path / "metrics.jsonl").stat()
    obstacle.rmdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there

    state = train_eval("digits", words(home, "train.seed=1"), return_state=True)

    assert state.is_completed(), state.message
    after = (run.path / "metrics.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (run.path / "report.html").is_file()
    assert Ledger.load(run.path / "mlflow.json").status == "FINISHED"


def test_wrong_override_stops_the_flow_before_it_starts_anything(tmp_path: Path) -> None:
    state = train_eval("digits", words(tmp_path / "home", "train.step=4"), return_state=True)

    assert state.is_failed()
    assert "unknown key 'train.step', did you mean train.steps" in state.message
    assert not (tmp_path / "home").exists()


def test_a_server_that_is_gone_is_said_in_one_line(tmp_path: Path) -> None:
    """As after `make down` in a shell that has read var/env."""
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "DCGAN_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "flows.train_eval", "digits"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stdout.startswith("error: Failed to reach API at http://127.0.0.1:9/api")
    assert "PREFECT_API_URL unset" in done.stdout
    assert "Traceback" not in done.stderr
