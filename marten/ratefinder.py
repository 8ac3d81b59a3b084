"""Which learning rate to begin with: a few steps at rising rates, the loss of each, and where it falls fastest.

Source: Smith 2017, Cyclical Learning Rates for Training Neural Networks (arXiv 1506.01186), section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from marten.errors import DONE, TrainingError, UsageError
from marten.files import replacing, write_text
from marten.metrics import Running
from marten.progress import Bar, say
from marten.settings import Settings

STEPS = 100
_LEAST, _MOST = 1e-7, 1.0
_MEMORY = 0.9
"""Weight of the earlier losses in the smoothed one."""
_TOO_MUCH = 4.0
"""Times the least smoothed loss beyond which the rest is noise."""


def find_rate(settings: Settings, steps: int = STEPS) -> int:
    """Try rates from 1e-7 to 1, write lr_finder.csv and lr_finder.png into the run's folder, and tell the rate.

    The rate of the backbone rises in proportion to the head's, as --lr has them; --freeze holds. Nothing is trained:
    no weights are written.

    Returns:
        0.

    Raises:
        UsageError: a run is in progress in this folder.
        TrainingError: the loss falls at none of the rates.
    """
    from marten.training import Run

    checkpoint = settings.run_folder / "checkpoint.pt"
    if checkpoint.exists():
        raise UsageError(f"a run is in progress here ({checkpoint}): give another --model_path to find a rate")
    run = Run(settings)
    base = settings.lr[0]
    run.learner.factor = lambda step, steps: rate_at(step, steps) / base
    run.learner.begin_epoch(0)
    rates: list[float] = []
    losses: list[float] = []
    try:
        with Bar("Trying rates", steps) as bar:
            epoch, batches = 0, run.batches.epoch(0)
            for step in range(steps):
                batch = next(batches, None)
                if batch is None:
                    epoch += 1
                    batches = run.batches.epoch(epoch)
                    batch = next(batches)
                seen = Running(run.runtime.device)
                run.learner.learn(*batch, step, steps, seen)
                if not math.isfinite(seen.loss):
                    break
                rates.append(run.learner.lr)
                losses.append(seen.loss)
                bar.step(step + 1, f"lr {rates[-1]:.1e}  loss {losses[-1]:.4f}")
                if losses[-1] > 2 * _TOO_MUCH * min(losses):
                    break
    finally:
        run.batches.close()
        run.held_out.close()
    if not losses:
        raise TrainingError("the very first loss is no number: try --precision fp32, or other --weights")
    smooth = smoothed(losses)
    chosen = steepest(rates, smooth)
    folder = settings.run_folder
    rows = (f"{rate:.6g},{loss:.6g},{soft:.6g}\n" for rate, loss, soft in zip(rates, losses, smooth, strict=True))
    write_text(folder / "lr_finder.csv", "lr,loss,smoothed_loss\n" + "".join(rows))
    _plot(rates, losses, smooth, chosen, folder / "lr_finder.png")
    if chosen is None:
        raise TrainingError(
            f"the loss falls at none of {len(rates)} rates tried, see {folder / 'lr_finder.png'}: a larger --batch_size"
            " or other --weights may help"
        )
    say(f"The loss falls fastest at --lr {chosen:.1e}, after {len(rates)} steps; see {folder / 'lr_finder.png'}")
    return DONE


def rate_at(step: int, steps: int) -> float:
    """Rate of a step: equal factors from 1e-7 to 1."""
    return float(_LEAST * (_MOST / _LEAST) ** (step / max(steps - 1, 1)))


def smoothed(losses: Sequence[float]) -> list[float]:
    """Running mean with a memory of about ten steps, without a bias towards the first."""
    mean, told = 0.0, []
    for count, loss in enumerate(losses, 1):
        mean = _MEMORY * mean + (1 - _MEMORY) * loss
        told.append(mean / (1 - _MEMORY**count))
    return told


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the loss falls fastest over the logarithm of the rate, before its least value.

    Each slope is that of a line through eleven neighbours, which a single odd batch does not turn. None where
    it falls nowhere, or too few steps were made.
    """
    least = min(range(len(losses)), key=losses.__getitem__, default=0)
    reach = 5
    slopes = {}
    for middle in range(reach, min(least + 1, len(losses) - reach)):
        xs = [math.log(rate) for rate in rates[middle - reach : middle + reach + 1]]
        ys = losses[middle - reach : middle + reach + 1]
        x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
        products = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
        slopes[middle] = products / sum((x - x_mean) ** 2 for x in xs)
    best = min(slopes, key=slopes.__getitem__, default=None)
    return None if best is None or slopes[best] >= 0 else rates[best]


def _plot(
    rates: Sequence[float], losses: Sequence[float], smooth: Sequence[float], chosen: float | None, path: Path
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(rates, losses, color="#c3c8d0", linewidth=1, label="loss of each step")
    axes.plot(rates, smooth, color="#1f6feb", label="smoothed")
    if chosen is not None:
        axes.axvline(chosen, color="#d1495b", linestyle="--", label=f"falls fastest at {chosen:.1e}")
    axes.set_xscale("log")
    axes.set_ylim(0.9 * min(losses), 1.5 * max(smooth[: max(1, len(smooth) // 2)]))
    axes.set_xlabel("learning rate of the head")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as neighbour:
        figure.savefig(neighbour, format="png", dpi=110)
