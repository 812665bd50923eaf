"""SIGTERM: a checkpoint of the step that was played, and then what SIGTERM did before."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fabricated
import pytest
import torch

from dcgan import checkpoint, distributed, preemption, stages, storage
from dcgan.distributed import Place
from dcgan.run import Run
from dcgan.step import Game

SMALL = ("train.steps=40", "train.batch_size=16", "train.log_every=10", "train.checkpoint_every=20", "model.width=2")


@pytest.fixture
def run(home: Path) -> Run:
    return fabricated.new_run(home, [*SMALL, "compute.workers=0", "train.sample_every=40"])


def terminate_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process SIGTERM while it plays a step."""
    play = Game.step

    def playing(self: Game, number: int, *others: object) -> object:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return play(self, number, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Game, "step", playing)
    monkeypatch.setattr(preemption, "LOOK", 0.0)


def wait(run: Run, again: bool) -> None:
    """For a training that does not end, with one SIGTERM or two."""
    with preemption.awaited(run):
        os.kill(os.getpid(), signal.SIGTERM)
        assert (run.path / preemption.FILE).exists()
        if again:
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(60)
        raise AssertionError("not reached")


def test_what_goes_wrong_while_it_ends_does_not_keep_it_from_ending(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    def end() -> None:
        with preemption.awaited(run):
            os.kill(os.getpid(), signal.SIGTERM)
            raise OSError("a full disk")

    with pytest.raises(KeyboardInterrupt):
        end()
    assert "a full disk" in caplog.text


def test_a_run_that_is_about_to_be_trained_is_not_trained_by_another(run: Run) -> None:
    with run.claim(), pytest.raises(storage.BusyError, match=f"run {run.name} is being written by process"):
        stages.train(run)


def test_what_a_killed_process_left_stops_nothing(run: Run) -> None:
    (run.path / preemption.FILE).touch()
    thread = threading.Thread(target=stages.train, args=(run,))  # where signals can't be handled
    thread.start()
    thread.join()
    assert max(checkpoint.steps(run)) == 40


def test_the_step_is_kept_and_the_same_command_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        terminate_in(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            stages.train(run)
    assert checkpoint.steps(run) == [13]
    assert [line["step"] for line in run.metrics()] == [10, 13]
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (run.path / preemption.FILE).exists()
    stages.train(run)
    assert [line["step"] for line in run.metrics()] == [10, 13, 20, 30, 40]

    whole = fabricated.new_run(run.home, [*SMALL, "compute.workers=0", "train.sample_every=40", "train.log_every=5"])
    stages.train(whole)
    resumed, uninterrupted = (checkpoint.load(one.checkpoints / "40") for one in (run, whole))
    for name in ("generator", "discriminator"):
        assert all((resumed[name][key] == value).all() for key, value in uninterrupted[name].items())


def test_what_sigterm_did_before_is_done_then(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Prefect's own handler, which ends a flow that is cancelled."""

    class Cancelled(BaseException):
        pass

    def cancel(*_: object) -> None:
        raise Cancelled

    terminate_in(monkeypatch, 3)
    before = signal.signal(signal.SIGTERM, cancel)
    try:
        with pytest.raises(Cancelled):
            stages.train(run)
        assert signal.getsignal(signal.SIGTERM) is cancel
    finally:
        signal.signal(signal.SIGTERM, before)
    assert checkpoint.steps(run) == [4]


def test_a_second_sigterm_waits_for_nothing(run: Run) -> None:
    with pytest.raises(KeyboardInterrupt):
        wait(run, again=True)


def test_a_handler_that_is_put_back_after_it_was_called_does_what_sigterm_did_before(run: Run) -> None:
    """Ray reads which handler there is, replaces it while it starts, and puts it back."""

    def starting() -> None:
        with preemption.awaited(run):
            ask = signal.getsignal(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            signal.signal(signal.SIGTERM, ask)
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        starting()


def test_a_checkpoint_that_takes_too_long_is_not_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "GRACE", 0.01)
    with pytest.raises(KeyboardInterrupt):
        wait(run, again=False)


def test_a_request_of_a_process_that_was_killed_is_none(run: Run) -> None:
    (run.path / preemption.FILE).touch()
    stages.train(run)
    assert checkpoint.steps(run)[-1] == 40


def test_an_ignored_sigterm_stays_ignored_and_another_thread_changes_nothing(run: Run) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with preemption.awaited(run):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    thread = threading.Thread(target=lambda: preemption.awaited(run).__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("device", "expected"), [("cpu", [True, True]), ("cuda", [False, True])])
def test_several_gpus_agree_only_where_they_are_waited_for(
    run: Run, monkeypatch: pytest.MonkeyPatch, device: str, expected: list[bool]
) -> None:
    monkeypatch.setattr(distributed, "any_rank", lambda seen, place: seen)
    (run.path / preemption.FILE).touch()
    asked = preemption.Request(run, Place(0, 2, torch.device(device)))
    assert [asked(waiting=False), asked(waiting=True)] == expected


def test_ranks_stop_together_at_the_same_step(run: Run) -> None:
    """Under torchrun, which passes SIGTERM on to them; here one rank is asked by the file alone."""
    script = f"""
import sys
from dcgan import preemption
from dcgan.step import Game
from dcgan.train import train
from dcgan.run import Run
from pathlib import Path
run, play = Run.open(Path({str(run.path)!r})), Game.step
preemption.LOOK = 0.0

def playing(self, number, *others):
    if number == 12 and self.place.rank == 1:
        (run.path / preemption.FILE).touch()
    return play(self, number, *others)

Game.step = playing
train(run)
"""
    file = run.path / "script.py"
    file.write_text(script)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(file)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "was stopped at step 13, which is kept" in done.stderr
    assert checkpoint.steps(run) == [13]
