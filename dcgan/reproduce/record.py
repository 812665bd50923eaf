"""Stores what was measured for the tables as JSON, beside the page that shows it.

results/<table>.json holds {row: record}. A record has `command`, `commit`, `hardware` and `date`, and then either
`reason`, why it was not measured, or `figures` ({column: [value, spread, of]}), `controls`, `choices`, `scale`, `runs`,
`seeds` and `seconds`.
"""

import json
from pathlib import Path
from typing import Any

from dcgan import storage
from dcgan.reproduce import TABLES, page
from dcgan.reproduce.rows import Figure, Measured, Table

PAGE = "results.md"
LOCK_SECONDS = 60.0  # it is held for milliseconds


def keep(directory: Path, table: str, rows: dict[str, dict[str, Any]]) -> Path:
    """Put records of rows into results/<table>.json and the page, which is returned.

    A record of what was not measured never replaces one of what was.
    """
    results = directory / "results"
    results.mkdir(parents=True, exist_ok=True)
    with storage.hold(results / ".lock", str(results), LOCK_SECONDS):  # another process may end a row just now
        known = read(directory, table)
        for row, content in rows.items():
            if "figures" in content or "figures" not in known.get(row, {}):
                known[row] = content
        storage.write_json(results / f"{table}.json", known)
        return write_page(directory)


def read(directory: Path, table: str) -> dict[str, dict[str, Any]]:
    """Row to record; {} if no row of the table was tried."""
    file = directory / "results" / f"{table}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def write_page(directory: Path) -> Path:
    """Write the tables into the page between their marks, or at its end; the rest of the page is kept."""
    file = directory / PAGE
    records = {name: read(directory, name) for name in TABLES}
    text = page.replace(file.read_text(encoding="utf-8") if file.is_file() else "", page.tables(TABLES, records))
    storage.write_bytes(file, text.encode())
    return file


def measured(content: dict[str, Any]) -> Measured:
    """The measurement that a record has as JSON."""
    return Measured(
        _figures(content["figures"]),
        content["scale"],
        {name: _figures(cells) for name, cells in content["controls"].items()},
        content["choices"],
        tuple(content["runs"]),
    )


def _figures(cells: dict[str, Any]) -> dict[str, Figure]:
    return {column: Figure(*cell) for column, cell in cells.items()}


def words(table: Table, content: dict[str, Any]) -> str:
    """A record in one line."""
    if "reason" in content:
        return str(content["reason"])
    cells = [(c, content["figures"][c.key]) for c in table.columns if c.key in content["figures"]]
    return ", ".join(f"{column.title} {page.cell(column, Figure(*figure))}" for column, figure in cells)
