"""Summarises a run in words and one table, from the run directory; MLflow and the report show them."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dcgan import config, environment
from dcgan.run import Run, read_lines

CONTROLS = ("random_init", "raw_pixels")
HEADER = ("metric", "discriminator", "random init", "raw pixels")


@dataclass(frozen=True)
class Row:
    """One measured value. `features` are the trained discriminator's; the controls are None where not measured.

    gain: `features` minus `random_init`; None for what is not a score (a chosen hyperparameter, a standard deviation).
    """

    metric: str
    features: float | None
    random_init: float | None
    raw_pixels: float | None
    gain: float | None


def table(run: Run) -> list[Row]:
    """Every metric of every protocol that was run, in the order of `scores/`."""
    return [row for content in run.scores().values() for row in _rows(content["scores"])]


def _rows(scores: dict[str, dict[str, float]]) -> Iterator[Row]:
    names = dict.fromkeys(name for values in scores.values() for name in values)
    for name in names:
        features, random_init, raw_pixels = (
            scores.get(source, {}).get(name) for source in ("discriminator", *CONTROLS)
        )
        gain = None
        if is_score(name) and features is not None and random_init is not None:
            gain = features - random_init
        yield Row(name, features, random_init, raw_pixels, gain)


def is_score(name: str) -> bool:
    """Whether more is better, by how evaluators name metrics: `svm/accuracy`, but not `svm/c` or `..._std`."""
    return name.rpartition("/")[2].split("_")[0] in ("accuracy", "nmi", "ari") and not name.endswith("_std")


def score_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """Every score next to its two controls, as text under HEADER; `-` where a control was not measured.

    A mean over draws comes with its standard deviation. Chosen hyperparameters are not scores and are left out.
    """
    rows = {row.metric: row for row in table(run)}
    return [_cells(row, rows.get(f"{name}_std")) for name, row in rows.items() if is_score(name)]


def _cells(row: Row, deviation: Row | None) -> tuple[str, str, str, str]:
    features, random_init, raw_pixels = (
        _number(getattr(row, column), getattr(deviation, column, None))
        for column in ("features", "random_init", "raw_pixels")
    )
    return (row.metric, features, random_init, raw_pixels)


def _number(value: float | None, deviation: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if deviation is None else f"{value:.4f} ± {deviation:.4f}"


def main_rows(run: Run) -> list[Row]:
    """The accuracy of each protocol: what a reader looks at first."""
    return [row for row in table(run) if row.metric.endswith("/accuracy")]


def headline(run: Run) -> str:
    """One sentence: what was trained for how long, and what its features are worth."""
    lines = run.metrics()
    size = run.experiment.data.size
    images = lines[-1]["images"] if lines else 0
    trained = f"A DCGAN for {size}-pixel {dataset(run)} images, after seeing {images:,} in training"
    best = max((row for row in main_rows(run) if row.features is not None), key=_worth, default=None)
    if best is None:
        return f"{trained}; its features have not been scored."
    images = f" on {scored_dataset(run)}" if run.scored != run.fingerprint else ""
    against = f", and {best.random_init:.1%} without training" if best.random_init is not None else ""
    return f"{trained}; its discriminator's features have {best.features:.1%} in {best.metric}{images}{against}."


def _worth(row: Row) -> float:
    return row.features or 0.0


def flat(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Scores under one name each: `svm/accuracy`, `random_init/svm/accuracy`, and `svm/gain_over_random_init`."""
    named = dict(scores.get("discriminator", {}))
    for control in CONTROLS:
        named |= {f"{control}/{name}": value for name, value in scores.get(control, {}).items() if is_score(name)}
    for row in _rows(scores):
        if row.metric.endswith("/accuracy") and row.gain is not None:
            named[row.metric.replace("/accuracy", "/gain_over_random_init")] = row.gain
    return named


def markdown(run: Run) -> str:
    """The run in a screenful: the result, warnings, every score next to its controls, and how to repeat it."""
    warnings = [f"- **{event['event']}** at step {event['step']:,}: {event['message']}" for event in events(run)]
    rows = ["| " + " | ".join(cells) + " |" for cells in [HEADER, ["---"] * len(HEADER), *score_rows(run)]]
    parts = [headline(run), "\n".join(warnings), "\n".join(rows) if len(rows) > 2 else "", f"    {command(run)}"]
    return "\n\n".join(part for part in parts if part)


def dataset(run: Run) -> str:
    """The data set's name as the image store gives it; the run's name begins with it (`Run.create`)."""
    return run.name.rpartition("-")[0]


def scored_dataset(run: Run) -> str:
    """The data set whose images are scored, as `dataset` calls it."""
    return run.experiment.evaluate.images or dataset(run)


def events(run: Run) -> list[dict[str, Any]]:
    """The lines of events.jsonl: what went wrong or looked wrong in training, with step and message."""
    return read_lines(run.path / "events.jsonl")


def command(run: Run) -> str:
    """The command that repeats the run: its preset and every setting that differs from it, except the home."""
    wanted = run.experiment.flat()
    name, source = run.experiment.data.name, wanted["data.source"]
    words = [f"data.source={source}"] if run.experiment.data.source else []
    preset = config.build(name, words).flat()  # with the source, without which `folder` is not valid
    words += [f"{key}={value}" for key, value in wanted.items() if preset[key] != value and key != "data.home"]
    return shlex.join(["dcgan", "run", name, *words])


def scored(run: Run) -> str:
    """Which checkpoint the scores are of; "" if there are none. Settings that differ from the run's are named."""
    now = run.experiment.evaluate.model_dump(mode="json")
    groups: dict[str, list[str]] = {}
    for protocol, content in run.scores().items():
        words = f"the {content['chosen']} checkpoint, step {content['checkpoint']:,}"
        own = {key: value for key, value in content.get("settings", {}).items() if now.get(key, value) != value}
        words += "".join(f", evaluate.{key}={config.text(value)}" for key, value in own.items())
        groups.setdefault(words, []).append(protocol)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{', '.join(protocols)}: {words}" for words, protocols in groups.items())


def duration(seconds: float) -> str:
    """In the two largest units."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def trained_by(run: Run) -> str:
    """The commit of the code that trained a run; "" if that was not recorded, as under torchrun."""
    return environment.commit_of(found) if (found := _trained_in(run)) else ""


def trained_on(run: Run) -> str:
    """The hardware that trained a run, or as much of it as the waiting process saw; "" if that was not recorded."""
    return environment.hardware(found) if (found := _trained_in(run)) else ""


def _trained_in(run: Run) -> dict[str, Any] | None:
    file = run.path / "environment.json"
    return json.loads(file.read_text()) if file.is_file() else None
