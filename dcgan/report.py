"""Writes a run's report: one self-contained HTML file, made from the run directory and the store's manifest."""

import base64
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcgan import charts, checkpoint, config, environment, storage, summary, tracking
from dcgan.evaluate.published import OTHERS, PUBLISHED, RANDOM_INIT, RAW_PIXELS, Published
from dcgan.run import Run

STRIP = 12  # grids in the time-lapse: what a reader can take in, in a page of a few megabytes
CROP = 4  # images per side of a small grid: the same z in each

CHARTS: tuple[tuple[str, dict[str, str], tuple[float, float] | None], ...] = (
    ("Loss", {"d_loss": "discriminator", "g_loss": "generator"}, None),
    ("What the discriminator believes", {"d_real": "D(real)", "d_fake": "D(fake)"}, (0.0, 1.0)),
    ("Gradient norm", {"d_grad_norm": "discriminator", "g_grad_norm": "generator"}, None),
    ("Sliced Wasserstein distance, less is better", {"swd": "distance to real images"}, None),
    ("Speed", {"images_per_second": "images per second"}, None),
)


@dataclass(frozen=True)
class Grid:
    """A sample grid: the number of images seen when it was drawn, and the picture as a data URL."""

    images: int
    source: str
    width: int


@dataclass(frozen=True)
class Score:
    """A row of the score table as text. values: trained, random init, raw pixels, gain.

    better: whether it beats random init; None if equal, or if either is missing.
    """

    metric: str
    values: list[str]
    published: str
    better: bool | None

    @property
    def minor(self) -> bool:
        """Whether it is a chosen hyperparameter and not a score."""
        return not summary.is_score(self.metric)


def write(run: Run) -> Path:
    """Write report.html into the run and return its path. Works at any stage: what is not there yet is left out."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = templates.get_template("report.html.j2").render(_content(run))
    path = run.path / "report.html"
    storage.write_bytes(path, html.encode())
    return path


def _content(run: Run) -> dict[str, Any]:
    lines = run.metrics()
    grids = sorted(run.samples.glob("*.png"))
    return {
        "title": run.name,
        "headline": summary.headline(run),
        "events": summary.events(run),
        "final": _grid(run, grids[-1], CROP * 100) if grids else None,
        "strip": [_grid(run, path, CROP) for path in _evenly(grids, STRIP)],
        "charts": _charts(run, lines),
        "scores": _scores(run),
        "scored": summary.scored(run),
        "scored_dataset": summary.scored_dataset(run),
        "published": _published(run),
        "facts": _facts(run, lines),
        "settings": _settings(run),
        "data": _data(run),
        "environment": _environment(run),
        "command": summary.command(run),
        "mlflow": tracking.url(run),
    }


def _evenly(paths: list[Path], most: int) -> list[Path]:
    """At most `most` of the paths, evenly spaced, including the first and the last."""
    if len(paths) <= most:
        return paths
    return [paths[round(index * (len(paths) - 1) / (most - 1))] for index in range(most)]


def _grid(run: Run, path: Path, images_a_side: int) -> Grid:
    """A grid, or its upper left corner of `images_a_side` images per side."""
    from PIL import Image

    from dcgan.pictures import MARGIN

    side = images_a_side * (run.experiment.data.size + MARGIN) + MARGIN
    content = io.BytesIO()
    with Image.open(path) as picture:
        small = picture.crop((0, 0, min(side, picture.width), min(side, picture.height)))
        small.save(content, "PNG", optimize=True)
    seen = int(path.stem) * run.experiment.train.batch_size
    return Grid(seen, f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}", small.width)


def _charts(run: Run, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    marks = sorted({event["step"] * run.experiment.train.batch_size for event in summary.events(run)})
    end = max([*marks, *(line["images"] for line in lines[-1:])], default=0)  # divergence has no line
    drawn = []
    for title, names, unit in CHARTS:
        series = {label: _points(lines, key) for key, label in names.items()}
        series = {label: points for label, points in series.items() if points}
        if series:
            svg = charts.chart(title, series, (0, end), marks, unit)
            drawn.append({"title": title, "labels": list(series), "svg": svg})
    return drawn


def _points(lines: list[dict[str, Any]], key: str) -> list[charts.Point]:
    found = [(line["images"], line[key]) for line in lines if line.get(key) is not None]
    return [point for point in found if math.isfinite(point[1])]


def _scores(run: Run) -> list[Score]:
    """Scores first, each with its standard deviation where draws were repeated; then the hyperparameters chosen."""
    rows = {row.metric: row for row in summary.table(run)}
    published = PUBLISHED.get(summary.scored_dataset(run), {})
    scores = []
    for name, row in rows.items():
        if name.endswith("_std"):
            continue
        spread, known, is_score = rows.get(f"{name}_std"), published.get(name), summary.is_score(name)
        cells = [
            _cell(getattr(row, column), getattr(spread, column, None), is_score)
            for column in ("features", "random_init", "raw_pixels")
        ]
        cells.append("" if row.gain is None else f"{row.gain:+.4f}")
        better = row.gain > 0 if row.gain else None
        scores.append(Score(name, cells, f"{known.value:.4f}" if known else "", better))
    return sorted(scores, key=lambda score: score.minor)


def _published(run: Run) -> list[tuple[str, Published]]:
    """(metric, figure) of all published for the scored data set and the run's metrics; for each metric, best first."""
    name, measured = summary.scored_dataset(run), {row.metric for row in summary.table(run)}
    found = [item for known in (PUBLISHED, RANDOM_INIT, RAW_PIXELS) for item in known.get(name, {}).items()]
    found += [(metric, figure) for metric, figures in OTHERS.get(name, {}).items() for figure in figures]
    return sorted((item for item in found if item[0] in measured), key=lambda item: (item[0], -item[1].value))


def _cell(value: float | None, spread: float | None, is_score: bool) -> str:
    if value is None:
        return "-"
    if spread is not None:
        return f"{value:.4f} ±\N{NO-BREAK SPACE}{spread:.4f}"
    return f"{value:.4f}" if is_score else f"{value:.4g}"


def _facts(run: Run, lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    best, facts = checkpoint.read_best(run), []
    if lines:
        seconds = sum(line["seconds"] for line in lines)
        facts += [
            ("steps", f"{lines[-1]['step']:,} of {run.experiment.train.steps:,}"),
            ("images seen", f"{lines[-1]['images']:,}"),
            ("time training", summary.duration(seconds)),
            ("speed", f"{lines[-1]['images'] / seconds:,.0f} images/s" if seconds else "unknown"),
        ]
    if best:
        facts.append(("best checkpoint", f"step {best['step']:,}, distance {best['value']:.4g}"))
    return facts


def _settings(run: Run) -> list[dict[str, Any]]:
    """Every setting with its meaning; `own` marks those that differ from the defaults."""
    known = config.keys()
    rows = []
    for key, value in run.experiment.flat().items():
        knob = known[key]
        rows.append({"key": key, "value": value, "meaning": knob.description, "own": _differs(value, knob.default)})
    return rows


def _differs(value: str, default: Any) -> bool:
    return default is ... or value != config.text(default)


def _data(run: Run) -> dict[str, Any] | None:
    """The store's manifest; None if the store has been removed."""
    path = run.home / "stores" / run.fingerprint / storage.MANIFEST
    return {**json.loads(path.read_text()), "fingerprint": run.fingerprint} if path.is_file() else None


def _environment(run: Run) -> dict[str, Any]:
    """As recorded when training began; else that of the machine writing the page. `when` says which."""
    path = run.path / "environment.json"
    if path.is_file():
        return {"when": "when training began", **json.loads(path.read_text())}
    return {"when": "when this page was written", **environment.describe()}
