"""The tables as Markdown: published beside measured, controls below, and where each figure comes from."""

from collections.abc import Iterator, Mapping
from typing import Any

from dcgan.reproduce.rows import Column, Figure, Row, Table
from dcgan.summary import duration

BEGIN = "<!-- tables: written by `dcgan reproduce`, changed by hand in vain -->"
END = "<!-- end of tables -->"
Records = Mapping[str, dict[str, Any]]


def replace(text: str, tables: str) -> str:
    """The page with other tables between its marks; a page without marks gets them at its end."""
    before, begin, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not begin:
        before = f"{text.rstrip()}\n\n" if text.strip() else "# Results\n\n"
        after = "\n"
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def tables(known: Mapping[str, Table], records: Mapping[str, Records]) -> str:
    """Every table in order, measured or not."""
    return "\n".join(_table(name, table, records[name]) for name, table in known.items())


def _table(name: str, table: Table, records: Records) -> str:
    header = ["method"]
    for column in table.columns:
        header += [f"{column.title}: published"] if _is_published(table, column) else []
        header.append(f"{column.title}: measured")
    lines = [f"## {table.title}", "", f"    dcgan reproduce {name}", ""]
    lines += [table.note, ""] if table.note else []
    lines += [_line(header), _line(["---"] * len(header))]
    for row in table.rows:
        lines += map(_line, _rows(table, row, records.get(row.key)))
    lines.append("")
    origins: dict[str, list[str]] = {}
    for row in table.rows:
        origins.setdefault(_origin(row, records.get(row.key)), []).append(f"**{row.method}**")
    lines += [f"- {', '.join(methods)}: {origin}" for origin, methods in origins.items()]
    return "\n".join([*lines, ""])


def _rows(table: Table, row: Row, record: dict[str, Any] | None) -> Iterator[list[str]]:
    """The row, and a line for each of its controls."""
    reason = row.measure if isinstance(row.measure, str) else "not measured: not run yet"
    if record is None or "reason" in record:
        reason = record["reason"] if record else reason
        yield _cells(table, row.method, row.published, {c.key: reason.partition(":")[0] for c in table.columns})
        return
    measured = {c.key: f"**{_measured(c, record['figures'])}**" for c in table.columns}
    yield _cells(table, row.method, row.published, measured)
    for control, cells in record["controls"].items():
        yield _cells(table, f"- {control}", {}, {c.key: _measured(c, cells) for c in table.columns})


def _cells(table: Table, method: str, published: dict[str, Figure], measured: dict[str, str]) -> list[str]:
    """A line of the table: no column for published figures where no row has one."""
    cells = [method]
    for column in table.columns:
        if _is_published(table, column):
            cells.append(cell(column, published[column.key]) if column.key in published else "")
        cells.append(measured[column.key])
    return cells


def _is_published(table: Table, column: Column) -> bool:
    return any(column.key in row.published for row in table.rows)


def _measured(column: Column, cells: dict[str, Any]) -> str:
    return cell(column, Figure(*cells[column.key])) if column.key in cells else "-"


def cell(column: Column, figure: Figure) -> str:
    """A value with its spread, as percent where the column says so."""
    scale, digits = (100, 2) if column.percent else (1, 4)
    text = f"{scale * figure.value:.{digits}f}"
    return text if figure.spread is None else f"{text} ± {scale * figure.spread:.{digits}f}"


def _origin(row: Row, record: dict[str, Any] | None) -> str:
    """Where the published figure is from, and how, where and when the row was measured, or why not."""
    source = f" Published: {row.source}." if row.source else ""
    if record is None or "reason" in record:
        reason = record["reason"] if record else row.measure if isinstance(row.measure, str) else ""
        return f"{reason or 'not measured: not run yet'}.{source}"
    spreads = {f"{of}" for _, _, of in record["figures"].values() if of}
    parts = [
        record["scale"],
        f"{record['seeds']} seed{'s' * (record['seeds'] > 1)}",
        *(f"± over {of}" for of in sorted(spreads)),
        *(f"{key}: {_value(value)}" for key, value in record["choices"].items()),
        f"the command took {duration(record['seconds'])}",
        record["hardware"],
        f"commit {record['commit']}" if record["commit"] else "no commit",
        record["date"],
    ]
    return f"{'; '.join(parts)}.{source} `{record['command']}`"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
