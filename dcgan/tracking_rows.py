"""Logs a measured row of a reproduced table as an MLflow run; one experiment per table makes its rows comparable."""

from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from dcgan import tracking, tracking_run
from dcgan.tracking_ledger import milliseconds

TOKEN = "dcgan.token"


def log(
    home: Path, experiment: str, name: str, token: str, metrics: dict[str, float], params: dict[str, Any], text: str
) -> None:
    """Create the finished run of a row, unless one with this token exists; one that a kill left RUNNING is ended.

    metrics: `measured/<column>`, `published/<column>` and the like. text: the run's description, Markdown. Raises
    TrackingError if MLflow can't be reached or refuses.
    """
    address = tracking.without_password(tracking.uri(home))
    with tracking_run.failures(address):
        client: MlflowClient = tracking_run.connect(home)
        now = milliseconds()
        tags = {"mlflow.source.name": "dcgan", "mlflow.source.type": "LOCAL", "mlflow.note.content": text}
        where, mine = tracking_run.experiment(client, home, experiment), f"tags.`{TOKEN}` = '{token}'"
        known = client.search_runs([where], mine)
        for run in known:
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
        if any(run.info.status == "FINISHED" for run in known):
            return
        run = client.create_run(where, now, {TOKEN: token}, name)
        try:
            client.log_batch(
                run.info.run_id,
                [Metric(key, value, now, 0) for key, value in metrics.items()],
                [Param(key, str(value)) for key, value in params.items()],
                [RunTag(key, value) for key, value in tags.items()],
                synchronous=True,
            )
        except MlflowException:
            client.set_terminated(run.info.run_id, "FAILED")
            raise
        client.set_terminated(run.info.run_id, "FINISHED")
