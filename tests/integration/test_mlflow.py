"""Delivery to a real MLflow: a SQLite file, and a server that is away before, during and after training."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fabricated
import numpy as np
import pytest
import torch
from mlflow_server import Gate, Server

from dcgan import export, feature_banks, features, mirror_runs, stages, storage, tracking
from dcgan.run import Run
from dcgan.tracking_ledger import Ledger

mlflow = pytest.importorskip("mlflow")
pytestmark = pytest.mark.slow

STEPS = list(range(10, 601, 10))
TRAINED = {"d_loss", "g_loss", "d_real", "d_fake", "d_grad_norm", "g_grad_norm", "images_per_second"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., object]) -> Path:
    """A home with one small store and one SQLite file, whose creation takes seconds."""
    home = tmp_path_factory.mktemp("mlflow")
    make_store(home)
    return home


@pytest.fixture
def new_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    seeds = iter(range(int.from_bytes(os.urandom(3)), 2**32))
    return lambda *overrides: fabricated.new_run(home, [f"train.seed={next(seeds)}", "model.width=8", *overrides])


def ledger(run: Run) -> Ledger:
    return Ledger.load(run.path / "mlflow.json")


def client(run: Run) -> "mlflow.MlflowClient":
    return mlflow.MlflowClient(tracking_uri=tracking.uri(run.home))


def record(run: Run) -> "mlflow.entities.Run":
    return client(run).get_run(ledger(run).run_id)


def steps(run: Run, metric: str) -> list[int]:
    """The training steps at which MLflow has the metric, ascending, as often as it has them."""
    history = client(run).get_metric_history(ledger(run).run_id, metric)
    return sorted(past.step // run.experiment.train.batch_size for past in history)


def artifacts(run: Run, folder: str | None = None) -> set[str]:
    return {file.path for file in client(run).list_artifacts(ledger(run).run_id, folder)}


def grids(run: Run) -> list[int]:
    """The images seen at each sample grid in MLflow, ascending."""
    names = [name for name in artifacts(run, "images") if name.endswith(".webp")]
    return sorted(int(name.split("+")[2]) for name in names)


def test_everything_a_run_has_is_delivered_once(new_run: Callable[..., Run]) -> None:
    run = new_run()
    fabricated.finished(run)
    for step, swd in ((200, 0.1), (400, 0.3), (600, 0.2)):
        fabricated.save(run, step, swd)
    (run.path / "report.html").write_text("<p>the page</p>")
    tracking.start(run, {"prefect": "http://prefect/runs/7"})
    first = tracking.sync(run)
    tracking.finish(run, "FINISHED")

    known = record(run)
    assert known.info.run_name == run.name
    assert known.info.status == "FINISHED"
    assert client(run).get_experiment(known.info.experiment_id).name == "random"
    assert known.data.params == run.experiment.flat()
    assert known.data.tags["prefect"] == "http://prefect/runs/7"
    assert known.data.tags["fingerprint"] == run.fingerprint
    assert "svm/accuracy" in known.data.tags["mlflow.note.content"]
    dataset = known.inputs.dataset_inputs[0]
    assert (dataset.dataset.name, dataset.dataset.digest) == ("random", run.fingerprint)
    assert {tag.key: tag.value for tag in dataset.tags} == {"mlflow.data.context": "training"}
    profile = json.loads(dataset.dataset.profile)
    assert profile["train classes"] == "0 32, 1 32"
    assert profile["train pixels"].startswith(f"{run.store().images('train')[:, 0].mean():.1f} ± ")

    assert {name for name in known.data.metrics if name.startswith("train/")} == {
        f"train/{name}" for name in [*TRAINED, "swd"]
    }
    assert steps(run, "train/d_loss") == STEPS
    assert steps(run, "train/swd") == [200, 400, 600]
    assert [m.value for m in client(run).get_metric_history(known.info.run_id, "train/d_loss")] == [
        line["d_loss"] for line in run.metrics()
    ]
    assert steps(run, "svm/accuracy") == [600]
    assert known.data.metrics["random_init/svm/accuracy"] == 0.88
    assert known.data.metrics["raw_pixels/svm/accuracy"] == 0.91
    assert known.data.metrics["svm/gain_over_random_init"] == pytest.approx(0.05)
    assert grids(run) == [step * run.experiment.train.batch_size for step in range(0, 601, 100)]
    assert artifacts(run, "checkpoints") == {"checkpoints/200", "checkpoints/600", "checkpoints/best.json"}
    assert artifacts(run, "scores") == {"scores/clustering.json", "scores/svm.json"}
    assert {"experiment.json", "metrics.jsonl", "report.html", "environment.json"} <= artifacts(run)
    assert "mlflow.json" not in artifacts(run)
    assert first.files == 9

    again = tracking.sync(run)
    assert (again.metrics, again.images, again.files, again.models) == (0, 0, 0, 0)


def test_scores_of_an_earlier_checkpoint_that_was_chosen_later_are_those_shown(new_run: Callable[..., Run]) -> None:
    run = new_run()
    fabricated.finished(run)
    tracking.sync(run)
    file = run.path / "scores" / "svm.json"
    content = json.loads(file.read_text())
    content["checkpoint"] -= 200
    content["scores"]["discriminator"]["svm/accuracy"] = 0.125
    file.write_text(json.dumps(content))
    tracking.sync(run)
    assert record(run).data.metrics["svm/accuracy"] == 0.125


def test_what_a_kill_left_half_written_is_not_delivered(new_run: Callable[..., Run]) -> None:
    run = new_run()
    fabricated.finished(run)
    (run.path / "scores" / ".svm.json.1a2b3c4d").write_text("{")
    tracking.sync(run)
    assert artifacts(run, "scores") == {"scores/clustering.json", "scores/svm.json"}


def test_a_checkpoint_that_is_no_longer_kept_leaves_mlflow(new_run: Callable[..., Run]) -> None:
    run = new_run()
    fabricated.save(run, 200, 0.3)
    tracking.sync(run)
    fabricated.save(run, 400, 0.2)
    tracking.sync(run)
    assert artifacts(run, "checkpoints") == {"checkpoints/400", "checkpoints/best.json"}
    assert artifacts(run, "checkpoints/400") == {"checkpoints/400/manifest.json", "checkpoints/400/state.pt"}


def test_lines_written_anew_after_a_resume_are_not_sent_again(new_run: Callable[..., Run]) -> None:
    run = new_run()
    fabricated.play(run, 0, 300)
    tracking.sync(run)
    fabricated.cut(run, 200)
    tracking.sync(run)
    fabricated.play(run, 200, 600)
    tracking.sync(run)
    assert steps(run, "train/d_loss") == STEPS


def test_what_arrived_without_an_answer_is_not_sent_twice(new_run: Callable[..., Run]) -> None:
    run = new_run()
    fabricated.finished(run)
    fabricated.save(run, 600)
    feature_banks.extract(run)
    tracking.sync(run)
    known = ledger(run)
    # What a process leaves that is killed after MLflow has taken an item and before that is written down.
    content = json.loads((run.path / "mlflow.json").read_text())
    content |= {"pending": list(known.sent), "sent": {}, "run_id": "", "images": 640}
    storage.write_json(run.path / "mlflow.json", content)
    later = time.time() + 60
    os.utime(run.path / "metrics.jsonl", (later, later))  # MLflow itself drops a value with the same time

    tracking.sync(run)
    assert ledger(run).run_id == known.run_id
    assert steps(run, "train/d_loss") == STEPS
    assert steps(run, "svm/accuracy") == [600]
    assert len(grids(run)) == 7
    assert len(record(run).outputs.model_outputs) == 2
    assert ledger(run).pending == []


def test_a_ledger_of_a_lost_machine_that_lags_behind_doubles_nothing(new_run: Callable[..., Run]) -> None:
    run = new_run()
    fabricated.play(run, 0, 300)
    tracking.sync(run)
    copy = (run.path / "mlflow.json").read_bytes()  # the last that reached `data.remote`
    fabricated.play(run, 300, 600)
    fabricated.draw(run, range(0, 601, 100))
    tracking.sync(run)
    found = mirror_runs.copied_ledger(copy, run.path / "mlflow.json")
    assert found is not None
    storage.write_bytes(run.path / "mlflow.json", found)
    later = time.time() + 60
    os.utime(run.path / "metrics.jsonl", (later, later))  # MLflow itself drops a value with the same time

    tracking.sync(run)
    assert steps(run, "train/d_loss") == STEPS
    assert len(grids(run)) == 7
    assert not ledger(run).copied
    fabricated.play(run, 600, 700)
    tracking.sync(run)
    assert steps(run, "train/d_loss") == list(range(10, 701, 10))


def test_two_processes_deliver_the_same_run_at_once(new_run: Callable[..., Run]) -> None:
    run = new_run()
    fabricated.finished(run)
    code = "import sys; from pathlib import Path; from dcgan import run, tracking; "
    code += "print(tracking.sync(run.Run.open(Path(sys.argv[1]))).metrics)"
    command = [sys.executable, "-c", code, str(run.path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    delivered = [int(process.communicate(timeout=120)[0]) for process in both]
    assert sorted(delivered)[0] == 0
    assert steps(run, "train/d_loss") == STEPS
    assert len(grids(run)) == 7
    found = client(run).search_runs([ledger(run).experiment_id], f"attributes.run_name = '{run.name}'")
    assert len(found) == 1


def test_a_deleted_mlflow_run_is_replaced_and_that_is_said(
    new_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run()
    fabricated.finished(run)
    old = tracking.sync(run).run_id
    client(run).delete_run(old)
    new = tracking.sync(run).run_id
    assert new != old
    assert f"{old} of {run.name} was deleted" in caplog.text
    assert steps(run, "train/d_loss") == STEPS


def test_a_value_that_is_not_finite_becomes_a_tag(new_run: Callable[..., Run]) -> None:
    run = new_run()
    fabricated.play(run, 0, 20)
    line = {**fabricated.line(run, 30), "d_loss": math.nan, "g_loss": math.inf, "d_real": None}
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    event = {"step": 30, "event": "non_finite", "message": "d_loss, g_loss not finite"}
    (run.path / "events.jsonl").write_text(json.dumps(event) + "\n")
    tracking.sync(run)
    tags = record(run).data.tags
    assert steps(run, "train/d_loss") == steps(run, "train/g_loss") == [10, 20]
    assert steps(run, "train/d_fake") == [10, 20, 30]
    assert tags["not_finite.train/d_loss"] == "nan at step 30"
    assert tags["not_finite.train/g_loss"] == "inf at step 30"
    assert tags["event.non_finite"] == "step 30: d_loss, g_loss not finite"


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (SystemExit, "KILLED"), (KeyboardInterrupt, "KILLED")]
)
def test_training_that_ends_early_is_shown_as_such(
    new_run: Callable[..., Run], error: type[BaseException], status: str
) -> None:
    run = new_run()
    run_id = tracking.start(run)
    with pytest.raises(error), tracking.follow(run):
        raise error
    assert record(run).info.status == status
    stages.report(run)  # to look at what there is
    assert record(run).info.status == status
    assert Ledger.load(run.path / "mlflow.json").run_id == run_id


def test_status_follows_the_run_through_failure_and_resume(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run_id = tracking.start(run)
    assert record(run).info.status == "RUNNING"
    tracking.finish(run, "KILLED")
    assert record(run).info.status == "KILLED"
    with tracking.follow(run):
        time.sleep(2)
        assert record(run).info.status == "RUNNING"
    tracking.finish(run, "FAILED")
    assert record(run).info.status == "FAILED"
    assert tracking.start(run) == run_id


def test_a_setting_that_may_change_between_runs_is_shown_as_it_is_now(new_run: Callable[..., Run]) -> None:
    run = new_run("evaluate.draws=5")
    tracking.start(run)
    for draws in (7, 5):
        evaluate = run.experiment.evaluate.model_copy(update={"draws": draws})
        changed = Run(run.path, run.experiment.model_copy(update={"evaluate": evaluate}), run.fingerprint, run.scored)
        tracking.start(changed)
        assert record(run).data.params["evaluate.draws"] == "5"
        assert record(run).data.tags["now.evaluate.draws"] == str(draws)


def test_follow_delivers_while_training_runs(new_run: Callable[..., Run]) -> None:
    run = new_run()
    with tracking.follow(run):
        fabricated.play(run, 0, 100)
        fabricated.draw(run, [0, 100])
        _until(lambda: ledger(run).images == 100 * run.experiment.train.batch_size)
        fabricated.play(run, 100, 600)
    assert steps(run, "train/d_loss") == STEPS
    assert grids(run) == [0, 6400]


def test_follow_asks_mlflow_for_nothing_while_nothing_is_written(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, courier, visits = new_run(), tracking._courier, []

    def counted(*arguments: Any, **wanted: Any) -> Any:
        visits.append(time.monotonic())
        return courier(*arguments, **wanted)

    monkeypatch.setattr(tracking, "_courier", counted)
    monkeypatch.setattr(tracking, "SOON", 0.05)
    monkeypatch.setattr(tracking, "EVERY", 0.05)
    with tracking.follow(run):
        fabricated.play(run, 0, 100)
        _until(lambda: ledger(run).images == 100 * run.experiment.train.batch_size)
        time.sleep(0.5)  # a delivery that had begun before the last line was written
        seen = len(visits)
        time.sleep(1)
        assert len(visits) == seen
        fabricated.draw(run, [100])
        _until(lambda: grids(run) == [6400])
    assert len(visits) > seen


def _until(true: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("conditional", [False, True])
def test_models_load_without_this_package_and_equal_the_exported_nets(
    new_run: Callable[..., Run], conditional: bool
) -> None:
    run = new_run(f"model.conditional={str(conditional).lower()}")
    fabricated.save(run, 600)
    feature_banks.extract(run)
    assert tracking.sync(run).models == 2
    outputs = {output.model_id: output for output in record(run).outputs.model_outputs}
    assert {output.step for output in outputs.values()} == {600 * run.experiment.train.batch_size}
    models = {client(run).get_logged_model(model_id).name: model_id for model_id in outputs}
    assert set(models) == {"generator", "feature-extractor"}
    mlflow.set_tracking_uri(tracking.uri(run.home))

    generator = export.load(run.path / "export" / "generator.safetensors")
    z = torch.randn(5, run.experiment.model.z_dim)
    inputs = (z, torch.arange(5) % 2) if conditional else (z,)
    with torch.no_grad():
        drawn = generator(*inputs)
        loaded = mlflow.pytorch.load_model(f"models:/{models['generator']}")(*inputs)
    torch.testing.assert_close(loaded, drawn)

    extractor = features.load_extractor(run.path / "export" / "discriminator.safetensors")
    images = np.random.default_rng(0).uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        expected = extractor(torch.from_numpy(images)).numpy()
    served = mlflow.pyfunc.load_model(f"models:/{models['feature-extractor']}").predict(images)
    np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server")
    try:
        server.start()
        yield server
    finally:
        server.stop()


def test_a_server_that_is_away_costs_nothing_and_gets_everything_once(
    tmp_path: Path, make_store: Callable[..., object], server: Server,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    gate = Gate(server.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.address)
    monkeypatch.setattr(tracking, "EVERY", 0.5)
    caplog.set_level(logging.INFO, "dcgan")
    make_store(tmp_path / "home")
    run = fabricated.new_run(tmp_path / "home", ["model.width=8"])

    # Away before training: a warning each for start and follow, and an id for nobody.
    assert tracking.start(run, {"asked": "early"}) is None
    assert tracking.url(run) is None
    with tracking.follow(run):
        fabricated.play(run, 0, 200)
        time.sleep(2)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 2
    with pytest.raises(tracking.TrackingError, match=rf"MLflow at {gate.address} can't be reached: .*refused"):
        tracking.sync(run)

    # There, then hanging in the middle: training ends all the same.
    gate.open()
    with tracking.follow(run):
        _until(lambda: ledger(run).images == 200 * run.experiment.train.batch_size)
        server.signal(signal.SIGSTOP)
        fabricated.play(run, 200, 400)
        time.sleep(1)
    server.signal(signal.SIGCONT)
    run_id = ledger(run).run_id

    # Cut off in the middle of a delivery, and away at the end.
    with tracking.follow(run):
        fabricated.play(run, 400, 500)
        _until(lambda: ledger(run).images == 500 * run.experiment.train.batch_size)
        gate.close()
        fabricated.play(run, 500, 600)
        fabricated.draw(run, range(0, 601, 100))
    fabricated.score(run)
    fabricated.save(run, 600)
    tracking.finish(run, "FINISHED")

    # Back: everything is there, once, in the same run.
    gate.open()
    tracking.sync(run)
    assert ledger(run).run_id == run_id
    assert record(run).data.tags["asked"] == "early"
    assert tracking.url(run).startswith(f"{gate.address}/#/experiments/")
    assert steps(run, "train/d_loss") == STEPS
    assert steps(run, "svm/accuracy") == [600]
    assert grids(run) == [step * 64 for step in range(0, 601, 100)]
    assert artifacts(run, "checkpoints/600") == {"checkpoints/600/manifest.json", "checkpoints/600/state.pt"}
    assert record(run).info.status == "FINISHED"
    fabricated.save(run, 1000, 0.1)
    tracking.sync(run)
    assert artifacts(run, "checkpoints") == {"checkpoints/1000", "checkpoints/best.json"}
    gate.close()
