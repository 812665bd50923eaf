"""Delivers to MLflow what a run has recorded in its directory, now or later, each item once.

The training loop knows nothing of MLflow. `follow` runs a thread alongside, `sync` delivers what is still missing, and
the ledger, `mlflow.json` in the run, records what has arrived. A slow or unreachable server costs training nothing.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from dcgan import environment, storage
from dcgan.run import Run
from dcgan.tracking_ledger import Ledger, milliseconds

if TYPE_CHECKING:
    from dcgan.tracking_courier import Courier

log = logging.getLogger(__name__)

EVERY = 10.0  # seconds between deliveries, each of which takes 30 ms of a processor
SOON = 0.5  # seconds between looks for the first line, so that a short run is seen at once
PATIENCE = 5.0  # seconds that the end of training waits for the last delivery
LOCK_SECONDS = 60.0  # another process may be uploading this run
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds, not 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a retried POST whose answer was lost arrives twice; we look first
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",  # asks a package index
    "MLFLOW_MODEL_CATALOG_URI": "",
}

MODE = "?workflowType=machine_learning"  # without it MLflow shows an experiment as one of language models


class TrackingError(RuntimeError):
    """MLflow could not be reached, or refused; one line with the address and why. What was not delivered is kept."""


@dataclass
class Delivery:
    """What one call delivered, and where to: metric values, sample grids, files (a checkpoint counts once), models."""

    run_id: str
    url: str | None
    metrics: int = 0
    images: int = 0
    files: int = 0
    models: int = 0


def uri(home: Path) -> str:
    """Where MLflow's record is kept: MLFLOW_TRACKING_URI if set, else a SQLite file in `home`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.absolute() / 'mlflow.db'}"


def without_password(address: str) -> str:
    """An address as it may be shown: also without a user, which may be a token."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else address


def server(home: Path) -> str:
    """What tells one record of MLflow from another: files of the same path on two machines differ."""
    address = without_password(uri(home))
    return address if urlsplit(address).scheme in ("http", "https") else f"{address} on {socket.gethostname()}"


def url(run: Run) -> str | None:
    """The page of the run's MLflow run; None if it has none yet or the record is a local file without a server."""
    ledger = Ledger.load(run.path / "mlflow.json")
    if not ledger.run_id or urlsplit(uri(run.home)).scheme not in ("http", "https"):
        return None
    return (
        f"{without_password(uri(run.home)).rstrip('/')}/#/experiments/{ledger.experiment_id}/runs/{ledger.run_id}{MODE}"
    )


def start(run: Run, tags: dict[str, str] | None = None) -> str | None:
    """Create the run's MLflow run, or set it to RUNNING, with parameters, data set and tags; returns its id.

    Never raises for an unreachable server: it warns and returns None, and the first delivery that gets through
    creates the run as requested here.
    """
    if not (run.path / "environment.json").is_file():
        _record_environment(run)
    return _attempt(run, status="RUNNING", ended=None, tags=tags or {})


def ensure(run: Run) -> None:
    """Create the run's MLflow run unless there is one, so that `url` links to it; its status stays."""
    if not (run.path / "environment.json").is_file():
        _record_environment(run)
    _attempt(run)


def is_running(path: Path) -> bool:
    """Whether the run in this directory has an MLflow run that was not ended, also if its process was killed."""
    return (path / "mlflow.json").is_file() and Ledger.load(path / "mlflow.json").status == "RUNNING"


def finish(run: Run, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """Deliver missing metrics and set the status; if MLflow is unreachable, warns and leaves it to `sync`."""
    _attempt(run, status=status, ended=milliseconds())


@contextmanager
def ending(runs: Callable[[], Iterable[Run]]) -> Iterator[None]:
    """End those of the runs in MLflow that are not ended, if the body raises: `how_it_ended` says how.

    Not if another process is at work on them, who will. runs: asked then, since the body may open them.
    """
    try:
        yield
    except storage.BusyError:
        raise
    except BaseException as error:
        for run in runs():
            if is_running(run.path):
                finish(run, how_it_ended(error))
        raise


def how_it_ended(error: BaseException) -> Literal["FAILED", "KILLED"]:
    """The status of a run that an error ended: Ctrl-C, SIGTERM and Prefect's cancellation are no `Exception`.

    A training that another process asked to stop is FAILED: whoever asked ends the run as it should be.
    """
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def sync(run: Run) -> Delivery:
    """Deliver all that the run directory holds and MLflow does not; calling it twice delivers nothing twice.

    Raises TrackingError, within seconds, if MLflow can't be reached; what arrived before stays recorded.
    """
    with _courier(run) as courier:
        courier.everything()
        return courier.delivery


@contextmanager
def follow(run: Run) -> Iterator[None]:
    """Deliver metrics and sample grids every few seconds while the body, training, runs, and at its end.

    The run is RUNNING; if the body raises, what `how_it_ended` says. Where and with what it trains is recorded in
    environment.json. Never raises itself: an unreachable server causes one warning, and the record on disk is delivered
    when it is back, or by `sync`.
    """
    _record_environment(run)
    stop = threading.Event()
    end: dict[str, Any] = {}  # how the run has ended, for the last delivery
    thread = threading.Thread(target=_follow, args=(run, stop, end), daemon=True, name=f"mlflow {run.name}")
    thread.start()
    try:
        yield
    except BaseException as error:
        end.update(status=how_it_ended(error), ended=milliseconds())
        raise
    finally:
        stop.set()
        thread.join(PATIENCE)
        if thread.is_alive():
            log.warning("MLflow is slow; `dcgan sync %s` delivers the rest", run.path)


def _record_environment(run: Run) -> None:
    storage.write_json(run.path / "environment.json", environment.describe())


def _follow(run: Run, stop: threading.Event, end: dict[str, Any]) -> None:
    away, pause, delivered = False, SOON, None
    wanted: dict[str, Any] = {"status": "RUNNING", "ended": None}  # once: whoever ends the run may do so meanwhile
    while True:
        last, found = stop.is_set(), _written(run)
        if last:
            wanted = dict(end)  # and not RUNNING, if that never arrived: whoever called `finish` knows better
        if last or found != delivered:  # an empty delivery costs as much as any other
            try:
                with _courier(run, **wanted) as courier:
                    wanted = {}
                    courier.progress()
                    pause = EVERY if courier.delivery.metrics else pause
                if away:
                    log.info("MLflow at %s is back; the record is delivered", without_password(uri(run.home)))
                away, delivered = False, found
            except (TrackingError, OSError) as error:
                if not away:
                    log.warning("%s; training continues and the record is kept in %s", error, run.path)
                away, pause = True, EVERY
        if last:
            return
        stop.wait(pause)


def _written(run: Run) -> list[int]:
    """When training last wrote each thing that is delivered meanwhile, in ns; 0: not yet."""
    places = (run.path / "metrics.jsonl", run.path / "events.jsonl", run.samples)
    return [place.stat().st_mtime_ns if place.exists() else 0 for place in places]


def _attempt(run: Run, **wanted: Any) -> str | None:
    try:
        with _courier(run, **wanted) as courier:
            courier.progress()
            return courier.delivery.run_id
    except (TrackingError, OSError) as error:
        log.warning("%s; nothing is lost: `dcgan sync %s` delivers it", error, run.path)
        return None


@contextmanager
def _courier(run: Run, **wanted: Any) -> "Iterator[Courier]":
    """The run's courier, connected, with exclusive access; `wanted` is recorded before MLflow is contacted."""
    with lock(run.path / ".mlflow.lock"):
        ledger = Ledger.load(run.path / "mlflow.json")
        for name, value in wanted.items():
            setattr(ledger, name, {**ledger.tags, **value} if name == "tags" else value)
        ledger.save()
        settle()
        from dcgan.tracking_courier import Courier  # imports MLflow: two seconds
        from dcgan.tracking_run import failures

        with failures(without_password(uri(run.home))):
            yield Courier(run, ledger)


def settle() -> None:
    """Set what MLflow reads from the environment, before it is imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock file. Raises TrackingError after LOCK_SECONDS."""
    with ExitStack() as stack:
        try:
            stack.enter_context(storage.hold(path, str(path.parent), LOCK_SECONDS))
        except storage.BusyError as error:
            raise TrackingError(f"{path.parent} is being delivered to MLflow by another process") from error
        yield
