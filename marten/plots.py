"""Pictures of a run: its loss and accuracy, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marten.files import replacing

_TRAIN, _VALID = "#8a8f98", "#1f6feb"


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw loss and accuracy of training and validation into a PNG.

    Raises:
        MartenError: the folder cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [row["epoch"] for row in history]
    measure = "accuracy" if "train_accuracy" in history[0] else "mae"
    for axes, name in zip(figure.subplots(1, 2), ("loss", measure), strict=True):
        axes.plot(epochs, [row[f"train_{name}"] for row in history], color=_TRAIN, marker=".", label="training")
        if f"validation_{name}" in history[0]:
            values = [row[f"validation_{name}"] for row in history]
            axes.plot(epochs, values, color=_VALID, marker=".", label="validation")
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle(title)
    with replacing(path) as neighbour:
        figure.savefig(neighbour, format="png", dpi=110)
