"""The flow `reproduce`: measures the rows of one published table, one by one, next to the published values."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import prefect.runtime.flow_run
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from flows import tasks

TableName = Literal["cifar10", "svhn", "clustering", "mnist", "image_quality"]


def _name() -> str:
    """The flow run's name: the words that would start it on the command line."""
    given = prefect.runtime.flow_run.parameters
    return " ".join([given["table"], *given["rows"], *given["overrides"]])


@flow(name="reproduce", flow_run_name=_name)
def reproduce(
    table: TableName,
    rows: Sequence[str] = (),
    overrides: Sequence[str] = (),
    seeds: Annotated[int, Field(ge=1)] = 1,
    results: str | None = None,
) -> dict[str, Any]:
    """Measure the rows of a published table and write them next to the published values.

    Args:
        table: The table.
        rows: The rows to measure; all if none are given.
        overrides: Settings to change, each section.key=value, or for one data set: cifar10/data.source=DIRECTORY.
        seeds: How many seeds each row is measured with, for mean and spread.
        results: The directory of results.md; the home if not given.

    Returns:
        page (its path) and rows ({row: record}). A row that could not be measured says why and does not fail the flow.
    """
    from dcgan.reproduce import TABLES, measure, page, record  # every evaluator: deploying the flow needs none
    from dcgan.reproduce.overrides import check, home

    wanted = [row.key for row in measure.choose(table, rows)]  # refused before anything starts
    check(overrides, seeds)
    logging.getLogger("dcgan").setLevel(logging.INFO)
    directory, found = Path(results).expanduser() if results else home(overrides), {}
    for row in wanted:
        found[row] = tasks.measure_row(table, row, overrides, seeds)
        file = record.keep(directory, table, {row: found[row]})  # what is measured is kept if a later row breaks
        get_run_logger().info("%s: %s", row, record.words(TABLES[table], found[row]))
    create_markdown_artifact(
        page.tables({table: TABLES[table]}, {table: record.read(directory, table)}),
        key=tasks.artifact_key("reproduce", table),
        description=TABLES[table].title,
    )
    return {"page": str(file), "rows": found}
