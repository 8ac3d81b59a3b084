"""Charts as inline SVG: they need no program to be read, take the page's colours, and say in words what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 280, 66, 12, 12, 44


def chart(
    told: str,
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    diagonal: bool = False,
    dots: bool = False,
) -> str:
    """Draw one or several series.

    Args:
        told: what a reader who does not see it is told.
        series: points by name; with several, a legend is drawn.
        x_label: of the axis across.
        y_label: of the axis upwards.
        x_range: its ends; by default those of the points.
        y_range: the same.
        diagonal: draw the line on which y equals x.
        dots: draw points alone, not joined.

    Returns:
        An <svg> element; its colours are the CSS classes s0, s1, ... of the page.
    """
    every = [point for points in series.values() for point in points]
    x_low, x_high = x_range or _ends([x for x, _ in every])
    y_low, y_high = y_range or _ends([y for _, y in every])

    def at(x: float, y: float) -> str:
        left = _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        top = _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{left:.1f},{top:.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(told)}">']
    for value in _ticks(y_low, y_high):
        place = at(x_low, value).split(",")[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place}" y2="{place}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{place}" dy="4" text-anchor="end">{value:g}</text>')
    for value in _ticks(x_low, x_high):
        place = at(value, y_low).split(",")[0]
        parts.append(f'<text x="{place}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(f'<text x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    if diagonal:
        low, high = max(x_low, y_low), min(x_high, y_high)
        parts.append(f'<polyline class="ideal" points="{at(low, low)} {at(high, high)}"/>')
    for number, points in enumerate(series.values()):
        places = [at(x, y) for x, y in points]
        if not dots:
            parts.append(f'<polyline class="line s{number}" points="{" ".join(places)}"/>')
        if dots or len(points) <= 40:
            radius = 2 if dots else 2.5
            for place in places:
                x, y = place.split(",")
                parts.append(f'<circle class="s{number}" cx="{x}" cy="{y}" r="{radius}"/>')
    parts.append("</svg>")
    legend = [f'<span class="key s{number}">{escape(name)}</span>' for number, name in enumerate(series)]
    return "".join(parts) + (f'<p class="legend">{" ".join(legend)}</p>' if len(legend) > 1 else "")


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or max(abs(low) * 0.05, 0.5)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two others."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def parallel(told: str, axes: Mapping[str, Sequence[str | float]], worth: Sequence[float]) -> str:
    """Draw things with several properties as lines over as many upright axes.

    Args:
        told: what a reader who does not see it is told.
        axes: by name, the value of each thing; numbers, or words. Numbers of which the largest is thirty times the
            smallest or more, all above 0, are spread by their logarithm.
        worth: of each thing, lower is better; the best is drawn last and boldly.

    Returns:
        An <svg> element.
    """
    width, height, top, bottom = 160 * max(len(axes), 3), 300, 24, 40
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(told)}">']
    places, words = [], []
    for number, (name, values) in enumerate(axes.items()):
        x = 80 + number * (width - 120) / max(len(axes) - 1, 1)
        ups, marks = _spread(values)
        places.append([(x, height - bottom - up * (height - top - bottom)) for up in ups])
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        words.append(f'<text x="{x:.1f}" y="{height - 12}" text-anchor="middle">{escape(name)}</text>')
        for up, word in marks:
            y = height - bottom - up * (height - top - bottom)
            words.append(
                f'<text class="over" x="{x - 6:.1f}" y="{y:.1f}" dy="4" text-anchor="end">{escape(word)}</text>'
            )
    order = sorted(range(len(worth)), key=lambda i: -worth[i])
    for rank, i in enumerate(order, 1):
        points = " ".join(f"{column[i][0]:.1f},{column[i][1]:.1f}" for column in places)
        is_best = rank == len(order)
        faint = 0.15 + 0.35 * rank / len(order)
        style = (
            'class="line s1" style="stroke-width:3.5"' if is_best else f'class="line s0" style="opacity:{faint:.2f}"'
        )
        parts.append(f'<polyline {style} points="{points}"/>')
    return "".join(parts + words) + "</svg>"


def _spread(values: Sequence[str | float]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where each value stands on an axis from 0 to 1, and the marks beside the axis."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values):
        words = sorted({str(value) for value in values})
        at = {word: (number + 0.5) / len(words) for number, word in enumerate(words)}
        return [at[str(value)] for value in values], [(up, word) for word, up in at.items()]
    low, high = min(numbers), max(numbers)
    if low == high:
        return [0.5] * len(numbers), [(0.5, f"{low:.3g}")]
    by_log = low > 0 and high / low >= 30
    change = math.log10 if by_log else float
    ends = change(low), change(high)
    marks = [10 ** (ends[0] + (ends[1] - ends[0]) * up) if by_log else low + (high - low) * up for up in (0, 0.5, 1)]
    ups = [(change(number) - ends[0]) / (ends[1] - ends[0]) for number in numbers]
    return ups, [(up, f"{mark:.3g}") for up, mark in zip((0.0, 0.5, 1.0), marks, strict=True)]
