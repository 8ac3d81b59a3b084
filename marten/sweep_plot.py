"""A picture of a sweep: every run's loss, epoch by epoch, and what each setting came to."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marten.files import replacing
from marten.sweep_results import Result, loss_of

_BEST, _DONE, _ENDED, _GRID = "#1f6feb", "#6b7280", "#c9ced6", 0.25
_SETTINGS = 5
"""Panels for settings; of more, those that came first."""


def plot_sweep(found: Sequence[Result], path: Path) -> None:
    """Draw the runs of a sweep into a PNG: the best one blue, pruned and unfinished ones light.

    Args:
        found: the best first.
        path: to write.

    Raises:
        MartenError: the folder cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    varied = [key for key in dict.fromkeys(k for r in found for k in r.settings) if len(_values(found, key)) > 1]
    panels = ["", *varied[:_SETTINGS]]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    begun = [result for result in found if result.history]
    told = "validation loss" if begun and "validation_loss" in begun[0].best else "training loss"
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        if panels[place]:
            _draw_setting(axes, begun, panels[place])
        else:
            _draw_curves(axes, begun)
        if place % columns == 0:
            axes.set_ylabel(told)
        axes.grid(alpha=_GRID)
        axes.spines[["top", "right"]].set_visible(False)
    if begun and max(r.loss for r in begun) > 4 * min(r.loss for r in begun) > 0:
        grid[0, 0].set_yscale("log")  # one scale for all panels
    with replacing(path) as neighbour:
        figure.savefig(neighbour, format="png", dpi=110)


def _draw_curves(axes: Any, begun: Sequence[Result]) -> None:
    finished = [result for result in begun if result.state == "finished"]
    best = (finished or begun)[:1]
    for result in [*reversed([r for r in begun if r not in best]), *best]:  # the best lies on top
        style = {
            "color": _colour(result, best),
            "marker": ".",
            "linestyle": "-" if result.state == "finished" else "--",
        }
        axes.plot([row["epoch"] for row in result.history], [loss_of(row) for row in result.history], **style)
    for colour, line, label in (
        (_BEST, "-", f"run {best[0].name}, the best" if best else ""),
        (_DONE, "-", "finished" if len(finished) > 1 else ""),
        (_ENDED, "--", "pruned or unfinished" if len(finished) < len(begun) else ""),
    ):
        if label:
            axes.plot([], [], color=colour, linestyle=line, label=label)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if begun:
        axes.legend(frameon=False, fontsize="small")


def _draw_setting(axes: Any, begun: Sequence[Result], key: str) -> None:
    values = _values(begun, key)
    best = [result for result in begun if result.state == "finished"][:1]
    numbers: dict[str, float] = {}
    with contextlib.suppress(ValueError):
        numbers = {value: float(value) for value in values}
        values.sort(key=float)
    if len(numbers) < 5:  # words, or so few numbers that they are better named than measured
        numbers = {value: float(place) for place, value in enumerate(values)}
        axes.set_xticks(range(len(values)), [value if len(value) < 15 else f"…{value[-13:]}" for value in values])
        axes.set_xlim(-0.6, len(values) - 0.4)
    elif min(numbers.values()) > 0 and max(numbers.values()) >= 10 * min(numbers.values()):
        axes.set_xscale("log")
    for result in begun:
        if key in result.settings:
            axes.plot(numbers[result.settings[key]], result.loss, "o", color=_colour(result, best))
    axes.set_xlabel(key)


def _values(found: Sequence[Result], key: str) -> list[str]:
    return sorted({result.settings[key] for result in found if key in result.settings})


def _colour(result: Result, best: Sequence[Result]) -> str:
    return _BEST if result in best else _DONE if result.state == "finished" else _ENDED
