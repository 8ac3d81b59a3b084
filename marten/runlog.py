"""What a run tells of its pictures and of itself: lines for a person, and the files of its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marten.datasets import PictureSet, find_pictures, inspect
from marten.files import write_text
from marten.plots import plot_curves
from marten.progress import Bar, say
from marten.scoretable import find_scores, has_scores
from modelspec import Preprocess


@dataclass
class Pace:
    """How fast one epoch went, as far as this process ran it: a resumed one did only its own share.

    Attributes:
        seconds: in training, without validation.
        waited_s: of these, the time in which no picture was ready.
        count: pictures trained on.
    """

    seconds: float = 0.0
    waited_s: float = 0.0
    count: int = 0

    @property
    def images_per_s(self) -> float:
        """Pictures trained on in a second."""
        return self.count / max(self.seconds, 1e-9)

    @property
    def wait_share(self) -> float:
        """Share of the time in which no picture was ready, 0 to 1."""
        return self.waited_s / max(self.seconds, 1e-9)


def look_at(root: Path, preprocess: Preprocess, on_bad: str) -> PictureSet:
    """Find and inspect the pictures, and tell what there is and what is left out; see `marten.datasets`.

    Raises:
        DataError: nothing that can be trained on, or something was rejected and `on_bad` is "refuse".
    """
    pictures = find_scores(root) if has_scores(root) else find_pictures(root)
    with Bar("Checking pictures", len(pictures.samples)) as bar:
        pictures = inspect(pictures, preprocess, on_bad, lambda done, _: bar.step(done))
    if pictures.rejected:
        say(f"{len(pictures.rejected)} files are not used:")
        for id_, reason in pictures.rejected[:10]:
            say(f"  {id_}: {reason}")
        if len(pictures.rejected) > 10:
            say(f"  and {len(pictures.rejected) - 10} more")
    say(f"{len(pictures.samples)} pictures in {pictures.root}: {counts_line(pictures.counts())}")
    return pictures


def write_metrics(folder: Path, history: Sequence[Mapping[str, Any]], pace: Pace, title: str) -> None:
    """Write metrics.jsonl and curves.png anew, and add the last epoch's line to timing.jsonl.

    Raises:
        MartenError: the folder cannot be written.
    """
    # rewritten whole from the history: after a resume the curve continues and never forks
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
    # times are no part of the result and stay out of it
    epoch = history[-1]["epoch"]
    timing = folder / "timing.jsonl"
    earlier = timing.read_text(encoding="utf-8").splitlines() if timing.is_file() else []
    kept = [line for line in earlier if _epoch_of(line) < epoch]  # of this run: none of one that was done before it
    if pace.count:
        row = {"epoch": epoch, "seconds": pace.seconds, "images_per_s": pace.images_per_s}
        kept.append(json.dumps({**row, "data_wait_share": pace.wait_share}))
    write_text(timing, "".join(line + "\n" for line in kept))
    plot_curves(history, folder / "curves.png", title)


def write_rates(folder: Path, rates: Sequence[tuple[float, float]]) -> None:
    """Write rates.csv anew: of each step, from 0, the learning rates of head and backbone that it really used.

    Raises:
        MartenError: the folder cannot be written.
    """
    lines = (f"{step},{head!r},{backbone!r}\n" for step, (head, backbone) in enumerate(rates))
    write_text(folder / "rates.csv", "step,head,backbone\n" + "".join(lines))


def _epoch_of(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut short by a power cut


def epoch_line(measured: Mapping[str, Any], epochs: int, pace: Pace) -> str:
    """One epoch in one line, for a person who looks at a log."""
    name, word = ("accuracy", "Acc") if "train_accuracy" in measured else ("mae", "MAE")
    parts = [
        f"Epoch {measured['epoch']}/{epochs}",
        f"Loss/train {measured['train_loss']:.4f}  {word}/train {measured[f'train_{name}']:.4f}",
    ]
    if "validation_loss" in measured:
        told = f"{word}/valid {measured[f'validation_{name}']:.4f}"
        parts.append(f"Loss/valid {measured['validation_loss']:.4f}  {told}")
    if pace.count:
        told = f"{pace.images_per_s:.1f} images/s, {100 * pace.wait_share:.0f} % waiting for data"
        parts.append(f"{pace.seconds:.1f} s, {told}")
    return " | ".join(parts)


def counts_line(counts: Mapping[str, int], most: int = 10) -> str:
    """How many pictures each class has, in words that fit on a line however many classes there are."""
    if len(counts) <= most:
        return ", ".join(f"{count} {name}" for name, count in counts.items())
    few, many = min(counts.values()), max(counts.values())
    return f"{len(counts):,} classes of {few:,} to {many:,} pictures, from {min(counts)} to {max(counts)}"
