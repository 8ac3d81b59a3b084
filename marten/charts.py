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
