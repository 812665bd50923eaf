"""What a person reads in a terminal, a log or a note: the line of a training step and the table of scores."""

import time
from collections.abc import Callable
from typing import Any

from dcgan.run import Run
from dcgan.summary import Row, is_score, table

HEADER = ("metric", "discriminator", "random init", "raw pixels")
INTERVAL = 2.0  # seconds between two lines of progress: seen to move, and a log of an hour stays readable


def score_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """Every score beside its two controls, as text under HEADER; `-` where a control was not measured.

    A mean over draws stands with its standard deviation. Chosen hyperparameters are no scores and are left out.
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


def text_table(run: Run) -> str:
    """The scores in aligned columns, under a line that says which checkpoint they are of."""
    rows = [HEADER, *score_rows(run)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([_scored(run), "", *lines])


def _scored(run: Run) -> str:
    scored = sorted({(content["checkpoint"], content["chosen"]) for content in run.scores().values()})
    if not scored:
        return f"{run.name}: not scored yet"
    return f"{run.name}: " + " and ".join(f"{chosen} checkpoint, step {step:,}" for step, chosen in scored)


def progress_line(line: dict[str, Any], steps: int) -> str:
    """A line of metrics.jsonl for a person, with the time left to step `steps` at the speed of that line."""
    done, speed = line["step"], line["images_per_second"]
    left = (steps - done) * line["images"] / done / speed
    words = [
        f"step {done:,}/{steps:,}",
        f"loss D {line['d_loss']:.3f} G {line['g_loss']:.3f}",
        f"D(real) {line['d_real']:.2f} D(fake) {line['d_fake']:.2f}",
        f"{speed:,.0f} images/s",
    ]
    if "swd" in line:
        words.append(f"swd {line['swd']:.4f}")
    if done < steps:
        words.append(f"{_duration(left)} left")
    return "  ".join(words)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


class Progress:
    """Called with each line of metrics.jsonl, says one every INTERVAL seconds, and each that closes a checkpoint."""

    def __init__(self, steps: int, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self.say, self.clock = steps, say, clock
        self.due = float("-inf")

    def __call__(self, line: dict[str, Any]) -> None:
        if self.clock() >= self.due or "swd" in line or line["step"] == self.steps:
            self.say(progress_line(line, self.steps))
            self.due = self.clock() + INTERVAL
