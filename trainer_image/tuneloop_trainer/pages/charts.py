"""Curves and intervals as SVG that stands in the page itself.

Drawn here because no library draws for this page: matplotlib is heavier than all else in the image, and SVG libraries for the web bring
scripts, fonts and sizes of their own, while this has to follow the page's colours and stay legible at a width of 360 px.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360.0, 170.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 8.0, 22.0
BUCKETS = 240
"""Columns that a curve is thinned to; each keeps its lowest and its highest value, so that no spike is lost."""
TICKS = 4

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `style` is a class of the style sheet: main, pale or second."""

    style: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Scale:
    """Maps values to places on an axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def chart(curves: Iterable[Curve], label: str) -> Markup:
    """The curves over steps; nothing where no curve has a finite value."""
    drawn = [Curve(curve.style, thinned(curve.points)) for curve in curves]
    points = [point for curve in drawn for point in curve.points]
    if not points:
        return Markup("")
    x = Scale(*_apart(min(at for at, _ in points), max(at for at, _ in points)), LEFT, WIDTH - RIGHT)
    low, high = _apart(min(value for _, value in points), max(value for _, value in points))
    margin = 0.04 * (high - low)
    y = Scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP)
    parts = [*_grid(x, y), *(_line(curve, x, y) for curve in drawn if curve.points)]
    return Markup(f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')


def interval(lower: float, upper: float, at: float, margin: float, better: str) -> Markup:
    """A difference with its interval, the line of no difference, and that of the margin. `better` is the side that is: left or right."""
    numbers = (lower, upper, at, 0.0, margin)
    if not all(map(math.isfinite, numbers)):
        return Markup("")
    x = Scale(*_apart(min(numbers), max(numbers)), 16.0, WIDTH - 16.0)
    left, right = ("better", "worse") if better == "left" else ("worse", "better")
    parts = [
        f'<text class="tick" x="0" y="10">← {left}</text>',
        f'<text class="tick" x="{WIDTH:g}" y="10" text-anchor="end">{right} →</text>',
        f'<line class="zero" x1="{x(0.0):.1f}" x2="{x(0.0):.1f}" y1="16" y2="42"/>',
        f'<line class="margin" x1="{x(margin):.1f}" x2="{x(margin):.1f}" y1="16" y2="42"/>' if margin else "",
        f'<line class="span" x1="{x(lower):.1f}" x2="{x(upper):.1f}" y1="29" y2="29"/>',
        f'<circle class="dot" cx="{x(at):.1f}" cy="29" r="5"/>',
    ]
    label = f"difference {at:.4g}, interval {lower:.4g} to {upper:.4g}"
    return Markup(f'<svg viewBox="0 0 {WIDTH:g} 46" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def thinned(points: Sequence[Point]) -> list[Point]:
    """The finite points, at most two for each of BUCKETS columns."""
    finite = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
    if len(finite) <= 2 * BUCKETS:
        return finite
    size = math.ceil(len(finite) / BUCKETS)
    kept: list[Point] = []
    for start in range(0, len(finite), size):
        column = finite[start : start + size]
        ends = {min(column, key=lambda point: point[1]), max(column, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of the last `window` values at each point."""
    finite = [point for point in points if math.isfinite(point[1])]
    total, means = 0.0, []
    for place, (at, value) in enumerate(finite):
        total += value - (finite[place - window][1] if place >= window else 0.0)
        means.append((at, total / min(place + 1, window)))
    return means


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Round numbers within the range: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * raw)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def named(value: float) -> str:
    """A tick's number in at most seven characters."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        thousands, letter = (value / 1e6, "M") if abs(value) >= 1e6 else (value / 1e3, "k")
        return f"{thousands:.3g}{letter}"
    return f"{value:.0e}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:.4g}"


def _apart(low: float, high: float) -> Point:
    """A range of some width around a single value."""
    if high - low > 1e-12 * max(abs(low), abs(high), 1e-300):
        return low, high
    around = abs(low) / 2 or 1.0
    return low - around, high + around


def _grid(x: Scale, y: Scale) -> Iterator[str]:
    for value in ticks(y.low, y.high):
        yield f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 5:g}" y="{y(value) + 4:.1f}" text-anchor="end">{named(value)}</text>'
    for value in ticks(x.low, x.high):
        if value == int(value):
            yield f'<text class="tick" x="{x(value):.1f}" y="{HEIGHT - 5:g}" text-anchor="middle">{named(value)}</text>'


def _line(curve: Curve, x: Scale, y: Scale) -> str:
    if len(curve.points) == 1:
        ((at, value),) = curve.points
        return f'<circle class="dot" cx="{x(at):.1f}" cy="{y(value):.1f}" r="3"/>'
    places = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in curve.points)
    return f'<polyline class="{curve.style}" points="{places}"/>'
