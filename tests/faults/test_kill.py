"""kill -9 in mid-training: of a Ray worker, and of the whole flow. Nothing is lost, repeated or left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dcgan import checkpoint, stages
from dcgan.config import build
from dcgan.run import Run

SETTINGS = [
    "model.width=8",
    "train.steps=800",  # on a fast machine an orphaned worker plays some hundreds before it notices
    "train.batch_size=32",
    "train.log_every=50",
    "train.sample_every=400",
    "train.checkpoint_every=100",
    "evaluate.protocols=[knn]",
]
LINES = list(range(50, 801, 50))
PATIENCE = 600  # seconds that a start, on a busy machine, may take


def start(command, home):
    log = (home / "log.txt").open("a")
    environment = {**os.environ, "DCGAN_HOME": str(home), "PREFECT_HOME": str(home / "prefect")}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for_step(process, home, step):
    """The run, as soon as its metrics have reached `step`."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, (home / "log.txt").read_text()[-3000:]
        for file in home.glob("runs/*/experiment.json"):
            run = Run.open(file.parent)
            if any(line["step"] >= step for line in run.metrics()):
                return run
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {PATIENCE} s: " + (home / "log.txt").read_text()[-3000:])


def final_state(run):
    assert checkpoint.latest(run).name == "800"
    return checkpoint.load(checkpoint.latest(run))


def in_session(leader):
    """Names of the processes of a session that are alive, but for Ray's agents: idle, they outlive it by a minute."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            name = (status.parent / "cmdline").read_text().replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(name)
    return [name for name in found if name not in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]


@pytest.mark.slow
def test_after_kills_of_a_worker_and_of_the_flow_the_same_command_ends_it_bit_for_bit(home, tmp_path):
    # Two workers have a thread each: one with two, whose cores other suites use too, takes three times as long.
    command = [sys.executable, "-m", "flows.train_eval", "digits", *SETTINGS, "compute.workers=2"]
    process = start(command, home)
    run = wait_for_step(process, home, 150)
    worker = int((run.path / ".lock").read_text())  # the process of rank 0
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    run = wait_for_step(process, home, 350)
    assert int((run.path / ".lock").read_text()) not in (worker, process.pid), "another one goes on"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60  # Ray's have a group of their own, and end because the flow's process has
    while in_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not in_session(process.pid), "processes of the killed flow are still there"
    interrupted_at = checkpoint.steps(run)[-1]
    assert 300 <= interrupted_at < 800

    process = start(command, home)
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        code = f"none in {PATIENCE} s"
    assert code == 0, (home / "log.txt").read_text()[-3000:]
    assert [line["step"] for line in run.metrics()] == LINES, "no gap and no double"
    assert run.scores().keys() == {"knn"}
    assert (run.path / "report.html").is_file()

    whole = stages.ingest(build("digits", [*SETTINGS, f"data.home={tmp_path / 'whole'}", "compute.workers=2"]))
    assert whole.name == run.name
    stages.train(whole)
    resumed, uninterrupted = final_state(run), final_state(whole)
    for name in ("generator", "discriminator"):
        for key, value in uninterrupted[name].items():
            assert torch.equal(resumed[name][key], value), f"{name}.{key}"
