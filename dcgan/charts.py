"""Draws line charts as SVG text: no script, no file, readable at phone width; the page sets colours and dashes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 230  # a phone is about 400 CSS pixels wide, so that text is not scaled down
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 8, 24  # margins: the numbers of the axes
MOST = 160  # points drawn per series: more than one per three pixels can't be told apart
TICKS = 5  # of an axis

Point = tuple[float, float]


@dataclass(frozen=True)
class Bucket:
    """Neighbouring points drawn as one: mean x, mean y, and the range of y."""

    x: float
    y: float
    low: float
    high: float


def thin(points: Sequence[Point]) -> list[Bucket]:
    """At most MOST buckets of neighbouring points, so that a spike stays visible in the range."""
    size = max(1, math.ceil(len(points) / MOST))
    buckets = []
    for start in range(0, len(points), size):
        xs, ys = zip(*points[start : start + size], strict=True)
        buckets.append(Bucket(sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys)))
    return buckets


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high]: steps of 1, 2 or 5 times a power of ten, about TICKS of them."""
    span = high - low
    rough = span / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number as an axis shows it: 0.25, 40k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}"


def chart(
    title: str,
    series: Mapping[str, Sequence[Point]],
    xs: tuple[float, float],
    marks: Sequence[float] = (),
    ys: tuple[float, float] | None = None,
) -> str:
    """An SVG element: one line per series, a dotted vertical line at each of `marks`. Raises ValueError without points.

    xs: the range of x. ys: the range of y; None fits it to the data. A series of few points shows each as a dot.
    """
    lines = {name: thin(points) for name, points in series.items() if points}
    everything = [bucket for buckets in lines.values() for bucket in buckets]
    if not everything:
        raise ValueError(f"chart {title!r} has no points")
    frame = _Frame(xs, ys or _range([bucket.low for bucket in everything] + [bucket.high for bucket in everything]))
    parts = [frame.axes(), *(frame.upright(mark) for mark in marks)]
    parts += [frame.line(index, buckets) for index, buckets in enumerate(lines.values())]
    label = escape(f"{title}: {', '.join(lines)}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The range of values and a little more, never empty."""
    low, high = min(values), max(values)
    pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - pad, high + pad


@dataclass(frozen=True)
class _Frame:
    """Maps values to positions in the picture."""

    xs: tuple[float, float]
    ys: tuple[float, float]

    def x(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> str:
        parts = []
        for value in ticks(*self.ys):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
        for value in ticks(*self.xs):
            x = self.x(value)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{number(value)}</text>')
        return "".join(parts)

    def upright(self, value: float) -> str:
        return f'<path class="mark" d="M{self.x(value):.1f} {TOP}V{HEIGHT - BOTTOM}"/>'

    def line(self, index: int, buckets: list[Bucket]) -> str:
        """The range as a band, the mean as a line, and dots if there are few points."""
        points = [(self.x(b.x), self.y(b.y)) for b in buckets]
        above = [(self.x(b.x), self.y(b.high)) for b in buckets]
        below = [(self.x(b.x), self.y(b.low)) for b in reversed(buckets)]
        parts = [f'<path class="line" d="M{_path(points)}"/>']
        if any(b.high > b.low for b in buckets):
            parts.insert(0, f'<path class="band" d="M{_path(above + below)}Z"/>')
        if len(points) <= 30:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        return f'<g class="s{index}">{"".join(parts)}</g>'


def _path(points: Sequence[Point]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
