"""What is sent to MLflow, and the ledger, without MLflow."""

import errno
import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fabricated
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcgan import config, environment, mirror_runs, report, summary, tracking
from dcgan.run import Run
from dcgan.tracking_ledger import Ledger


@pytest.fixture
def run(home: Path) -> Run:
    return fabricated.new_run(home)


def test_the_record_is_a_file_in_the_home_unless_the_environment_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert tracking.uri(tmp_path) == "https://mlflow.example"


def test_the_link_to_a_run_shows_no_password(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(run.path / "mlflow.json", run_id="abc", experiment_id="3")
    ledger.save()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example:5000/")
    assert tracking.url(run) == ("https://mlflow.example:5000/#/experiments/3/runs/abc?workflowType=machine_learning")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    assert tracking.url(run) is None


def test_a_ledger_of_another_server_does_not_replace_ones_own(tmp_path: Path) -> None:
    content, here = json.dumps({"run_id": "theirs", "server": "https://ml.example"}).encode(), tmp_path / "mlflow.json"
    copied = {"run_id": "theirs", "server": "https://ml.example", "copied": True}
    assert json.loads(mirror_runs.copied_ledger(content, here) or b"") == copied
    here.write_text(json.dumps({"run_id": "ours", "server": "https://ml.example"}))
    assert json.loads(mirror_runs.copied_ledger(content, here) or b"") == copied, "it knows more"
    here.write_text(json.dumps({"run_id": "ours", "server": "sqlite:///x on this machine"}))
    assert mirror_runs.copied_ledger(content, here) is None


@pytest.mark.parametrize("same", [True, False])
def test_a_run_is_delivered_anew_only_where_it_is_not_known(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, same: bool
) -> None:
    """One record may have two addresses: `make run` writes into the file that the server of `make up` keeps."""
    ids = []
    for file in ("mlflow.db", "runs/../mlflow.db" if same else "other.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run.home / file}")
        ids.append(tracking.start(run))
    assert None not in ids
    assert len(set(ids)) == (1 if same else 2)
    ledger = Ledger.load(run.path / "mlflow.json")
    assert (ledger.run_id, ledger.server) == (ids[1], tracking.server(run.home))
    assert "was deleted" not in caplog.text


def test_a_ledger_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    ledger = Ledger.load(tmp_path / "mlflow.json")
    ledger.images, ledger.tags = 640, {"a": "b"}
    ledger.begin("metrics")
    ledger.begin("data")
    ledger.end("data", "v1")
    assert Ledger.load(tmp_path / "mlflow.json") == ledger
    assert (ledger.pending, ledger.sent) == (["metrics"], {"data": "v1"})
    ledger.forget()
    assert (ledger.run_id, ledger.images, ledger.sent, ledger.pending, ledger.tags) == ("", -1, {}, [], {"a": "b"})


def test_a_delivery_waits_for_another_and_then_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "LOCK_SECONDS", 0.1)
    with tracking.lock(run.path / ".mlflow.lock"):
        with pytest.raises(tracking.TrackingError, match="being delivered to MLflow by another process"):
            tracking.sync(run)
        assert not (run.path / "mlflow.json").exists()


def test_training_goes_on_beside_a_server_that_never_was(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setattr(tracking, "EVERY", 0.05)
    with tracking.follow(run):
        fabricated.play(run, 0, 50)
        deadline = time.monotonic() + 120
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)  # for more of them
    warnings = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert [entry.getMessage().split(";")[0] for entry in warnings] == [
        "MLflow at http://127.0.0.1:9 can't be reached: [Errno 111] Connection refused"
    ]
    with pytest.raises(tracking.TrackingError, match="can't be reached"):
        tracking.sync(run)


def test_a_database_that_cannot_be_used_is_a_tracking_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"mysql+nosuchdriver://someone:secret@127.0.0.1:{listening.getsockname()[1]}/mlflow"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(
            tracking.TrackingError, match=r"MLflow can't use mysql\+nosuchdriver://.*nosuchdriver"
        ) as raised:
            tracking.sync(run)
    assert "secret" not in str(raised.value)


def test_a_server_that_answers_with_an_error_is_named_without_its_password(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(200 if self.path == "/health" else 503)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{server.server_port}")
        with pytest.raises(tracking.TrackingError, match=f"127.0.0.1:{server.server_port}") as raised:
            tracking.sync(run)
        server.shutdown()
    assert "secret" not in str(raised.value)


def test_an_exception_in_training_passes_through_follow(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ZeroDivisionError), tracking.follow(run):
        raise ZeroDivisionError


def test_a_disk_without_room_ends_neither_deliveries_nor_training(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Ledger, "save", full)
    monkeypatch.setattr(tracking, "SOON", 0.05)

    def training() -> None:
        with tracking.follow(run):
            while not caplog.records:
                time.sleep(0.05)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        training()
    assert "No space left on device" in caplog.text


def test_importing_tracking_brings_neither_mlflow_nor_its_settings() -> None:
    code = "import os, sys, dcgan.tracking; print('mlflow' in sys.modules, 'MLFLOW_HTTP_REQUEST_TIMEOUT' in os.environ)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout.split() == ["False", "False"]


def test_scores_have_the_same_names_in_every_run() -> None:
    scores = {
        "discriminator": {"svm/accuracy": 0.7, "svm/c": 0.1},
        "random_init": {"svm/accuracy": 0.8, "svm/c": 0.2},
        "raw_pixels": {"svm/accuracy": 0.5},
    }
    assert summary.flat(scores) == {
        "svm/accuracy": 0.7,
        "svm/c": 0.1,
        "random_init/svm/accuracy": 0.8,
        "raw_pixels/svm/accuracy": 0.5,
        "svm/gain_over_random_init": pytest.approx(-0.1),
    }


@pytest.mark.parametrize(
    ("name", "more_is_better"),
    [
        ("svm/accuracy", True),
        ("clustering/nmi_geometric", True),
        ("clustering/ari", True),
        ("svm_few_labels/accuracy_std", False),
        ("svm/c", False),
        ("knn/neighbours", False),
    ],
)
def test_scores_are_told_from_hyperparameters(name: str, more_is_better: bool) -> None:
    assert summary.is_score(name) is more_is_better


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "train.seed": st.integers(0, 2**32 - 1),
            "train.learning_rate": st.floats(1e-6, 1),
            "evaluate.c_grid": st.lists(st.floats(1e-9, 10), min_size=1, max_size=3, unique=True),
            "model.conditional": st.booleans(),
        },
    )
)
def test_the_command_of_a_run_makes_the_same_experiment(settings: dict[str, object]) -> None:
    wanted = config.build("digits", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    words = shlex.split(summary.command(Run(Path("/home/runs/digits-0"), wanted, "f", "f")))
    assert words[:3] == ["dcgan", "run", "digits"]
    assert config.build(words[2], words[3:]) == wanted


def test_a_folder_is_repeated_with_its_source(tmp_path: Path) -> None:
    wanted = config.build("folder", [f"data.source={tmp_path / 'my pictures'}", "train.seed=3"])
    words = shlex.split(summary.command(Run(Path("/home/runs/folder-0"), wanted, "f", "f")))
    assert config.build(words[2], words[3:]) == wanted


def test_no_more_processors_are_used_than_this_process_may() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert environment.cpus() <= len(allowed)
    os.sched_setaffinity(0, allowed[:1])
    try:
        assert environment.cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_an_environment_names_versions_and_commit() -> None:
    described = environment.describe()
    assert described["packages"]["torch"]
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    json.dumps(described)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("sse2 avx2 avx512f avx512_bf16 amx_bf16", "Xeon 9 (AMX)"),
        ("sse2 avx2 avx512f avx512_bf16", "Xeon 9 (AVX-512 BF16)"),
        ("sse2 avx2 avx512f", "Xeon 9 (AVX-512)"),
        ("sse2 avx2", "Xeon 9 (AVX2)"),
        ("sse2", "Xeon 9"),
    ],
)
def test_a_processor_is_named_with_the_instructions_that_decide_its_speed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, named: str
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: Xeon 9\nflags\t\t: {flags}\n" * 2)
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "cpuinfo")
    assert environment.describe()["cpu"] == f"{environment.cpus()} x {named}"


def test_a_run_recorded_with_a_password_is_shown_without_it(home: Path) -> None:
    """Before such addresses were refused."""
    run = fabricated.new_run(home)
    fabricated.score(run)
    recorded = json.loads((run.path / "experiment.json").read_text())
    recorded["experiment"]["data"]["source"] = "https://me:s3cret@host/digits?sig=s3cret"
    (run.path / "experiment.json").write_text(json.dumps(recorded))
    old = Run.open(run.path)
    assert "data.source=https://host/digits" in summary.command(old)
    assert old.experiment.flat()["data.source"] == "https://host/digits"
    assert "s3cret" not in summary.markdown(old) + report.write(old).read_text()


def test_a_command_that_hangs_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As nvidia-smi where the driver is in trouble."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(environment, "COMMAND_SECONDS", 0.1)
    assert environment.describe()["gpu"] == []


def test_only_code_that_decides_a_result_counts_as_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(environment, "_output", lambda command: asked.append(command) or "x")
    assert environment.commit() == "x (changed)"
    (status,) = (command for command in asked if "status" in command)
    assert status[status.index("--") + 1 :] == [":/dcgan", ":/flows", ":/constraints.txt"]
