"""Formats what people read in a terminal, a log or a note: the line of a training step and the table of scores."""

import time
from collections.abc import Callable
from typing import Any

from dcgan.run import Run
from dcgan.summary import HEADER, duration, score_rows, scored

SHOWN = (
    ("d_loss", "loss D", 3),
    ("g_loss", "loss G", 3),
    ("d_real", "D(real)", 2),
    ("d_fake", "D(fake)", 2),
    ("swd", "swd", 4),
)
INTERVAL = 2.0  # seconds between lines of progress: visibly moving, and an hour's log stays readable


def text_table(run: Run) -> str:
    """The scores in aligned columns, under a line that says which checkpoint they are of."""
    rows = [HEADER, *score_rows(run)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{run.name}: {scored(run) or 'not scored yet'}", "", *lines])


def progress_line(line: dict[str, Any], steps: int) -> str:
    """A line of metrics.jsonl for a person, with the time left to step `steps` at the speed of that line."""
    done, speed = line["step"], line["images_per_second"]
    left = (steps - done) * line["images"] / done / speed
    # With train.update=alternate a line of one step has metrics of one net only.
    known = [f"{words} {line[key]:.{digits}f}" for key, words, digits in SHOWN if key in line]
    words = [f"step {done:,}/{steps:,}", *known, f"{speed:,.0f} images/s"]
    if done < steps:
        words.append(f"{duration(left)} left")
    return "  ".join(words)


class Progress:
    """Called with each line of metrics.jsonl; reports one every INTERVAL seconds, and each that has a checkpoint."""

    def __init__(self, steps: int, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self.say, self.clock = steps, say, clock
        self.due = float("-inf")

    def __call__(self, line: dict[str, Any]) -> None:
        if self.clock() >= self.due or "swd" in line or line["step"] == self.steps:
            self.say(progress_line(line, self.steps))
            self.due = self.clock() + INTERVAL
