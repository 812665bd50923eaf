"""Measures rows of a table: each once per seed, kept on disk, sent to MLflow, shown beside what was published.

A row that can't be measured (no data, no weights) says why and does not stop the others. What was measured is kept
under `<home>/reproduced/<table>/<row>/`, so the same command resumes where it stopped; a row is measured again when its
table's module, its presets, the modules of its data sets or the evaluators have changed. To have that otherwise,
delete the file there and, for a row that trains, its run or the scores in it. If a run that was there already, or its
scores, came from other code, the record has that code's commit too.
"""

import dataclasses
import inspect
import itertools
import json
import logging
import re
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dcgan import config, environment, scoring, stages, storage, summary, tracking
from dcgan.config import DataSet
from dcgan.data.sources import SOURCES, base
from dcgan.evaluate.samples import computing_on
from dcgan.reproduce import TABLES, record
from dcgan.reproduce.overrides import check, digest, given, home
from dcgan.reproduce.rows import Figure, Measured, Row, Setting
from dcgan.run import Run

log = logging.getLogger(__name__)


def choose(table: str, names: Sequence[str]) -> list[Row]:
    """The rows of these keys, or all that are measured here. Raises ValueError for an unknown table or row."""
    if table not in TABLES:
        known = f"; tables are {', '.join(TABLES)}"
        raise ValueError(f"unknown table {table!r}{config.meant(table, TABLES) or known}")
    rows = {row.key: row for row in TABLES[table].rows}
    for name in names:
        if name not in rows:
            known = f"; rows are {', '.join(rows)}"
            raise ValueError(f"table {table} has no row {name!r}{config.meant(name, rows) or known}")
        if isinstance(rows[name].measure, str):
            raise ValueError(f"row {name}: {rows[name].measure}")
    return [row for row in rows.values() if (row.key in names if names else callable(row.measure))]


def reproduce(
    table: str,
    names: Sequence[str] = (),
    overrides: Sequence[str] = (),
    seeds: int = 1,
    results: Path | None = None,
    say: Callable[[str], object] = log.info,
) -> Path:
    """Measure rows of a table with seeds 0 to `seeds` - 1 and write them into `results` (None: the home).

    Returns the page. Raises ValueError, before any work, for a table, row or override that is unknown.
    """
    check(overrides, seeds)
    rows = choose(table, names)
    directory = results or home(overrides)
    for row in rows:
        say(f"{table}: {row.method}")
        content = one(table, row.key, overrides, seeds)
        page = record.keep(directory, table, {row.key: content})
        say(f"  {record.words(TABLES[table], content)}")
    return page


def one(table: str, name: str, overrides: Sequence[str], seeds: int) -> dict[str, Any]:
    """The record of one row: what was measured, or why nothing was; see `record`."""
    check(overrides, seeds)
    (row,) = choose(table, [name])
    words = shlex.join(["dcgan", "reproduce", table, row.key, *_seeds(seeds), *overrides])
    try:
        found = [_once(table, row, tuple(overrides), seed) for seed in range(seeds)]
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if not (config.is_for_users(error) or isinstance(error, MemoryError | torch.OutOfMemoryError)):
            raise
        reason = " ".join(str(error).split()).replace(str(home(overrides)), "HOME")
        return {**_where(), "command": words, "reason": f"not measured: {reason}"}
    measured = together([record.measured(kept["measured"]) for kept in found])
    content = {
        **{key: ", ".join(dict.fromkeys(kept[key] for kept in found)) for key in ("hardware", "commit", "date")},
        **dataclasses.asdict(measured),
        "command": words,
        "seconds": sum(kept["seconds"] for kept in found),
        "seeds": seeds,
    }
    _deliver(table, row, content, home(overrides))
    return content


def _once(table: str, row: Row, overrides: tuple[str, ...], seed: int) -> dict[str, Any]:
    """What a row gives with one seed, the seconds it took, where and when; kept, and not measured again."""
    assert callable(row.measure)
    name = digest(overrides, row.presets, seed, _code(table, row.presets))
    directory = home(overrides) / "reproduced" / table / row.key
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{name}.json"
    if file.is_file():
        kept = json.loads(file.read_text())
        for path in (home(overrides) / "runs" / name for name in kept["measured"]["runs"]):
            if tracking.is_running(path):  # killed after the row was kept, before its run was reported
                _report(path)
        return kept
    began, where = time.perf_counter(), _where()  # taken now: the code may change before the end
    setting = Setting(row.presets, overrides, seed, directory / name)
    with tracking.ending(setting.runs.values), computing_on(given(overrides, "compute.device") or "auto"):
        measured = row.measure(setting)
        where["commit"] = ", ".join(dict.fromkeys([*_commits(setting.runs.values()), where["commit"]]))
        trained = filter(None, map(summary.trained_on, setting.runs.values()))
        where["hardware"] = ", ".join(dict.fromkeys([*trained, where["hardware"]]))
        seconds = time.perf_counter() - began
        storage.write_json(file, {**where, "seconds": seconds, "measured": dataclasses.asdict(measured)})
    for run in setting.runs.values():
        stages.report(run)
    shutil.rmtree(setting.directory, ignore_errors=True)
    return json.loads(file.read_text())


def _report(path: Path) -> None:
    """Report a run whose row was measured, which holds also if the run is damaged by now."""
    try:
        stages.report(Run.open(path))
    except (ValueError, OSError, RuntimeError) as error:
        if not config.is_for_users(error):
            raise
        log.warning("run %s is not reported: %s", path.name, error)


@cache
def _code(table: str, presets: tuple[DataSet, ...]) -> str:
    """The digest of what decides how a row is measured: its table's module, its presets, their images, the evaluators.

    Of the images, the modules that say which there are and which are held out.
    """
    module = [file.read_text() for file in Path(__file__).parent.glob(f"{table}.py")]  # none of a test's own table
    readers = {str(inspect.getsourcefile(SOURCES[preset].read)) for preset in presets} | {str(base.__file__)}
    images = [Path(reader).read_text() for reader in sorted(readers)]
    return config.digest([module, {preset: config.sections(preset) for preset in presets}, images, scoring.code()])


def _commits(runs: Iterable[Run]) -> Iterator[str]:
    """Commits of the code that trained the runs and scored them, as far as they were recorded."""
    for run in runs:
        scored = (content.get("commit", "").split(", ") for content in run.scores().values())
        found = [summary.trained_by(run), *itertools.chain.from_iterable(scored)]
        yield from filter(None, found)


def together(found: Sequence[Measured]) -> Measured:
    """One measurement as it is; several as their mean, spread over the seeds."""
    if len(found) == 1:
        return found[0]
    return Measured(
        _mean([each.figures for each in found]),
        found[0].scale,
        {name: _mean([each.controls[name] for each in found]) for name in found[0].controls},
        {f"seed {seed} {key}": value for seed, each in enumerate(found) for key, value in each.choices.items()},
        tuple(name for each in found for name in each.runs),
    )


def _mean(cells: Sequence[dict[str, Figure]]) -> dict[str, Figure]:
    values = {column: [each[column].value for each in cells] for column in cells[0]}
    return {column: Figure(statistics.fmean(v), statistics.stdev(v), f"{len(v)} seeds") for column, v in values.items()}


def _seeds(seeds: int) -> list[str]:
    return ["--seeds", str(seeds)] if seeds > 1 else []


def _where() -> dict[str, Any]:
    """The hardware, commit and date of a measurement."""
    found = environment.describe()
    return {
        "hardware": environment.hardware(found),
        "commit": environment.commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _deliver(table: str, row: Row, content: dict[str, Any], where: Path) -> None:
    tracking.settle()
    from dcgan import tracking_rows  # imports MLflow

    metrics = {f"measured/{column}": cell[0] for column, cell in content["figures"].items()}
    metrics |= {f"spread/{column}": cell[1] for column, cell in content["figures"].items() if cell[1] is not None}
    metrics |= {f"published/{column}": figure.value for column, figure in row.published.items()}
    for control, cells in content["controls"].items():
        name = re.sub(r"\W+", "_", control)  # MLflow takes no comma
        metrics |= {f"{name}/{column}": cell[0] for column, cell in cells.items()}
    params = {key: content[key] for key in ("scale", "seeds", "seconds", "command", "commit", "hardware", "date")}
    chosen = {re.sub(r"[^\w/ ]", "", key): value for key, value in content["choices"].items()}  # MLflow takes no quote
    params |= {f"chosen.{name}": value for name, value in chosen.items()}
    params |= {"runs": " ".join(content["runs"]), "source": row.source or "-"}
    try:
        tracking_rows.log(where, f"reproduce-{table}", row.key, config.digest(content), metrics, params, row.method)
    except tracking.TrackingError as error:
        log.warning("%s; the row is kept in %s", error, where / "reproduced")
