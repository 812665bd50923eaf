"""The flow `train-eval`: ingest, train, extract, evaluate, report; it decides their order, and nothing else.

python -m flows.train_eval digits train.steps=300     on the server at PREFECT_API_URL, or on a temporary one
"""

import base64
import functools
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import prefect.runtime.flow_run
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import FlowRun, State

from dcgan import config, stages, summary, tables, tracking
from dcgan.config import Preset
from dcgan.run import Run
from flows import tasks

UNREACHABLE = "Failed to reach API at"  # how Prefect's error for it begins
FLOW_RUN = "prefect_flow_run"  # the tag of the MLflow run that names the flow run

say = functools.partial(print, flush=True)


def _name() -> str:
    """The flow run's name: the words that would start it on the command line."""
    given = prefect.runtime.flow_run.parameters
    return " ".join([given["preset"], *given["overrides"]])


def _end(status: Literal["FAILED", "KILLED"]) -> Any:
    """A hook that sets the status of the flow run's MLflow run. If the process died, the Prefect worker calls it."""

    def end(flow: Any, flow_run: FlowRun, state: State) -> None:
        try:
            home = config.build(flow_run.parameters["preset"], flow_run.parameters["overrides"]).home
        except ValueError:  # what the flow itself was refused for: there is no MLflow run
            return
        for ledger in home.glob("runs/*/mlflow.json"):
            if json.loads(ledger.read_text())["tags"].get(FLOW_RUN) == str(flow_run.id):
                tracking.finish(Run.open(ledger.parent), status)

    return end


@flow(
    name="train-eval",
    flow_run_name=_name,
    on_failure=[_end("FAILED")],
    on_cancellation=[_end("KILLED")],
    on_crashed=[_end("KILLED")],
)
def train_eval(preset: Preset, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train a DCGAN on a data set and measure what its discriminator's features are worth.

    Args:
        preset: The data set, with settings that suit it.
        overrides: Settings to change, each section.key=value, such as train.steps=2000; `dcgan run --help` lists them.

    Returns:
        run (its directory), scores ({protocol: {representation: {metric: value}}}) and mlflow (address or None).
    """
    config.build(preset, overrides)  # refused before anything starts
    logging.getLogger("dcgan").setLevel(logging.INFO)
    path = tasks.ingest(preset, overrides)
    run = Run.open(Path(path))
    with run.claim():  # another flow run that trains it keeps its MLflow run to itself
        tracking.start(run, tags={FLOW_RUN: str(prefect.runtime.flow_run.id)})
    extracted = tasks.extract(tasks.train(path))
    # One by one: each uses every processor, and holds the features of all images.
    states = {protocol: tasks.evaluate(extracted, protocol, return_state=True) for protocol in stages.protocols(run)}
    scores = {protocol: state.result() for protocol, state in states.items()}
    tasks.report(extracted)
    publish(run, preset)
    return {"run": path, "scores": scores, "mlflow": tracking.url(run)}


def publish(run: Run, preset: str) -> None:
    """Show the run as a Markdown artifact: scores next to their controls, the newest sample grid, where the rest is."""
    pictures = sorted(run.samples.glob("*.png"), key=lambda file: int(file.stem))
    grid = base64.b64encode(pictures[-1].read_bytes()).decode()
    address = tracking.url(run)
    where = f"[the run in MLflow]({address})" if address else f"run {run.name} in MLflow (`make ui`)"
    text = "\n\n".join(
        [
            f"# {run.name}",
            f"![samples at step {pictures[-1].stem}](data:image/png;base64,{grid})",
            f"Samples at step {int(pictures[-1].stem):,}. More in {where} and in the report, `{run.path}/report.html`.",
            summary.markdown(run),
        ]
    )
    key = tasks.artifact_key("train-eval", preset)
    create_markdown_artifact(text, key=key, description=f"Samples and scores of {run.name}")


def main(words: list[str]) -> int:
    """Run the flow for a preset and overrides; returns the exit code."""
    try:
        preset, *overrides = words
        config.build(preset, overrides)
    except ValueError as error:
        say(f"error: {error}" if words else "usage: python -m flows.train_eval PRESET [section.key=value ...]")
        return 2
    try:
        state = train_eval(preset, overrides, return_state=True)
    except KeyboardInterrupt:
        say("stopped; the same command continues from here")
        return 130
    except RuntimeError as error:
        if not str(error).startswith(UNREACHABLE):
            raise
        say(f"error: {error}. `make up` starts a server; with PREFECT_API_URL unset this command starts its own")
        return 1
    if not state.is_completed():
        say(f"error: {state.message}")
        return 1
    result = state.result()
    run = Run.open(Path(result["run"]))
    say("", tables.text_table(run), "", f"Report   {run.path / 'report.html'}", f"Samples  {run.samples}", sep="\n")
    where = result["mlflow"] or tracking.without_password(tracking.uri(run.home))
    home = "" if run.home == config.default_home() else f" DCGAN_HOME={shlex.quote(str(run.home))}"
    say(f"MLflow   {where}", "", f"To look at all of it: make ui{home}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
