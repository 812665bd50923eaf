"""One task per stage; retries, time limits and cache policy are decided only here.

Prefect caches no task. Each stage looks for its own result, under a name that is a function of everything that went
into it, and returns at once if it is there and valid; Prefect's cache would not notice a deleted file. Running any task
twice is therefore harmless, and a failed flow run is resumed by starting another.

Tasks pass on the run's directory, not objects: Prefect stores nothing, and any task can be rerun by hand.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from dcgan import config, stages, tables
from dcgan.config import Protocol
from dcgan.data.sources.attempts import DownloadError
from dcgan.remote import RemoteError
from dcgan.run import Run

HOUR = 3600.0


def artifact_key(*words: str) -> str:
    """The key of an artifact: Prefect takes lower-case letters, digits and hyphens."""
    return "-".join(words).replace("_", "-")


def _is_transient(task: Any, task_run: TaskRun, state: State) -> bool:
    """Whether the network failed. Wrong settings and addresses, missing and corrupt files would only fail again."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, RemoteError) or (isinstance(error, DownloadError) and error.transient)


@task(
    task_run_name="ingest",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=[10, 60, 120],
    retry_condition_fn=_is_transient,
    timeout_seconds=None,
)
def ingest(preset: str, overrides: Sequence[str]) -> str:
    """Put the images into a store; returns the run's directory.

    Retried, with growing delays, only when the network fails. No time limit: LSUN's 46 GB take a day on a slow line,
    and the download itself gives up on a server that sends nothing. If the data set was ingested before, its store is
    only verified.
    """
    return str(stages.ingest(config.build(preset, overrides)).path)


@task(task_run_name="train", cache_policy=NO_CACHE, retries=0, timeout_seconds=None)
def train(run: str) -> str:
    """Train to the last step, from the newest checkpoint; returns the run's directory, so that later tasks wait for it.

    Not retried here: Ray restarts workers that die, `compute.max_failures` times, and what fails after that
    would fail again. No time limit: the number of steps is one, and Ray notices workers that hang.
    """
    opened, logger = Run.open(Path(run)), get_run_logger()
    stages.train(opened, tables.Progress(opened.experiment.train.steps, logger.info))
    return run


@task(task_run_name="extract", cache_policy=NO_CACHE, retries=1, retry_delay_seconds=10, timeout_seconds=None)
def extract(run: str) -> str:
    """Write the feature banks; returns the run's directory.

    Retried once, because what can fail is the machine (memory, disk); each bank is whole or absent, so finished
    ones are kept. No time limit: on a CPU a million images take an hour, and more is a matter of their number.
    """
    stages.extract(Run.open(Path(run)))
    return run


@task(task_run_name="{protocol}", cache_policy=NO_CACHE, retries=1, retry_delay_seconds=10, timeout_seconds=None)
def evaluate(run: str, protocol: Protocol) -> dict[str, dict[str, float]]:
    """Score the features by one protocol: {representation: {metric: value}}.

    Retried once, as `extract`: each representation's scores are kept. No time limit: clustering the 100,000 images of
    Tiny ImageNet takes a day on a laptop.
    """
    return stages.evaluate(Run.open(Path(run)), protocol)


@task(task_run_name="report", cache_policy=NO_CACHE, retries=1, retry_delay_seconds=10, timeout_seconds=HOUR)
def report(run: str) -> str:
    """Write report.html and deliver the run to MLflow; returns the page's path.

    Retried once, as `extract`. An unreachable MLflow is no failure: the record waits in the run directory.
    """
    return str(stages.report(Run.open(Path(run))))


@task(task_run_name="{table} {row}", cache_policy=NO_CACHE, retries=0, timeout_seconds=None)
def measure_row(table: str, row: str, overrides: Sequence[str], seeds: int) -> dict[str, Any]:
    """Measure one row of a table; returns its record.

    Not retried: what fails for lack of data or weights is a record that says so, and what was measured with one
    seed is kept for the next flow run. No time limit: a row may train for days.
    """
    from dcgan.reproduce import measure  # imports every evaluator: only where needed

    return measure.one(table, row, overrides, seeds)
