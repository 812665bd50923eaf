"""Finds the MLflow run of a run, or creates it once; connects within seconds or not at all."""

import logging
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import requests
from mlflow import MlflowClient
from mlflow.entities import Param, RunTag, ViewType
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException, RestException
from sqlalchemy.exc import SQLAlchemyError

from dcgan import summary, tracking
from dcgan.run import Run
from dcgan.tracking import TrackingError
from dcgan.tracking_ledger import Ledger

log = logging.getLogger(__name__)

CONNECT_SECONDS = 3.0  # for any answer at all; a request then has MLFLOW_HTTP_REQUEST_TIMEOUT


@contextmanager
def failures(address: str) -> Iterator[None]:
    """Turn whatever keeps MLflow from taking a delivery into a one-line TrackingError."""
    try:
        yield
    except RestException as error:
        raise TrackingError(f"MLflow at {address} refused: {_line(error)}") from error
    except MlflowException as error:
        raise TrackingError(f"MLflow at {address} failed: {_line(error)}") from error
    except requests.RequestException as error:
        raise TrackingError(f"MLflow at {address} can't be reached: {_line(error)}") from error
    except (SQLAlchemyError, ImportError) as error:  # of a database that keeps MLflow's record
        raise TrackingError(f"MLflow can't use {address}: {_line(error)}") from error
    except OSError as error:
        raise TrackingError(f"can't deliver to MLflow at {address}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The first line without passwords, or just the system's message, which requests wraps four deep."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    own = re.search(r"\[Errno -?\d+\] [\w ]+|Read timed out", text)
    return own[0] if own else re.sub(r"//[^/@\s]+@", "//", text)


def connect(home: Path) -> MlflowClient:
    """A client for the server, or the SQLite file, that keeps the record; raises quickly if nothing answers there."""
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)  # forty lines when a SQLite file is created
    uri = tracking.uri(home)
    _knock(uri)
    with tracking.lock(home / ".mlflow.lock"):  # two processes creating the same SQLite file break it
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


def _knock(uri: str) -> None:
    """Raise within CONNECT_SECONDS if nothing answers; MLflow itself retries for minutes."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        requests.get(f"{uri.rstrip('/')}/health", timeout=CONNECT_SECONDS)
    elif parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), CONNECT_SECONDS).close()


def open_run(client: MlflowClient, run: Run, ledger: Ledger) -> MlflowRun:
    """The MLflow run that the ledger names, or a new one, with the experiment as parameters."""
    known = _find(client, run, ledger) if ledger.run_id else None
    if ledger.server != (here := tracking.server(run.home)):
        ledger.server = here
        ledger.save()
    if known is None:
        _create(client, run, ledger)
        known = client.get_run(ledger.run_id)
    _log_params(client, run, known)
    return known


def _find(client: MlflowClient, run: Run, ledger: Ledger) -> MlflowRun | None:
    """The ledger's run, also by another address of the same record; None if it is not there (any more)."""
    elsewhere = ledger.server not in ("", tracking.server(run.home))
    known = None
    try:
        known = client.get_run(ledger.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    if elsewhere and (known is None or known.data.tags.get("dcgan.token") != ledger.token):
        ledger.forget()
        return None
    if known is None or known.info.lifecycle_stage == "deleted":
        log.warning("MLflow run %s of %s was deleted; a new one takes its place", ledger.run_id, run.name)
        return None
    return known


def _create(client: MlflowClient, run: Run, ledger: Ledger) -> None:
    experiment_id = experiment(client, run.home, summary.dataset(run))
    found = []
    if "run" in ledger.pending:  # requested before, but no answer came
        mine = f"tags.`dcgan.token` = '{ledger.token}'"
        found = client.search_runs([experiment_id], mine, ViewType.ACTIVE_ONLY, 1)
    else:
        ledger.forget()
        ledger.begin("run")
    tags = {"dcgan.token": ledger.token, "mlflow.source.name": "dcgan", "mlflow.source.type": "LOCAL"}
    created = found[0] if found else client.create_run(experiment_id, ledger.started, tags, run.name)
    ledger.run_id, ledger.experiment_id = created.info.run_id, experiment_id
    ledger.end("run", ledger.run_id)


def experiment(client: MlflowClient, home: Path, name: str) -> str:
    """The id of the experiment of this name: one per data set or table, so that its runs can be compared."""
    known = client.get_experiment_by_name(name)
    if known is None:
        remote = urlsplit(tracking.uri(home)).scheme in ("http", "https")
        location = None if remote else (home / "mlartifacts" / name).absolute().as_uri()
        try:
            return client.create_experiment(name, location, {"mlflow.experimentKind": "custom_model_development"})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            known = client.get_experiment_by_name(name)  # another run was quicker
    if known.lifecycle_stage == "deleted":
        client.restore_experiment(known.experiment_id)  # its name is taken for ever
    return known.experiment_id


def _log_params(client: MlflowClient, run: Run, known: MlflowRun) -> None:
    """MLflow never changes a parameter: a setting of `compute` or `evaluate` that differs now becomes `now.<key>`."""
    params, tags = known.data.params, known.data.tags
    wanted = run.experiment.flat()
    missing = [Param(key, value) for key, value in wanted.items() if key not in params]
    shown = {key: tags.get(f"now.{key}", params.get(key, value)) for key, value in wanted.items()}
    changed = [RunTag(f"now.{key}", value) for key, value in wanted.items() if shown[key] != value]
    if missing or changed:
        client.log_batch(known.info.run_id, params=missing, tags=changed, synchronous=True)


def set_status(client: MlflowClient, ledger: Ledger, known: MlflowRun) -> None:
    """RUNNING, or how the run ended and when."""
    if ledger.status == known.info.status:
        return
    if ledger.status == "RUNNING":
        client.update_run(ledger.run_id, "RUNNING")
    else:
        client.set_terminated(ledger.run_id, ledger.status, ledger.ended)
