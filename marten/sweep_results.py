"""What the runs of a sweep have come to: read from what they left, as a table, the best of them first."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marten.errors import DataError, UsageError
from marten.sweep import RUNS

PRUNED = "pruned"
"""File in a run's folder that says that the run was ended because others did better."""


@dataclass(frozen=True)
class Result:
    """What one run has come to.

    Attributes:
        name: of the run.
        weights: its state dict.
        settings: what it was given, beside what all were given.
        history: the rows of its metrics.jsonl.
        state: "finished", "pruned", or "unfinished" where it runs, waits, or was stopped.
    """

    name: str
    weights: Path
    settings: dict[str, str]
    history: tuple[dict[str, Any], ...]
    state: str

    @property
    def epochs(self) -> int:
        """Behind it."""
        return len(self.history)

    @property
    def best(self) -> dict[str, Any]:
        """The row with the lowest validation loss; empty before the first epoch."""
        return min(self.history, key=loss_of, default={})

    @property
    def loss(self) -> float:
        """What runs are compared by; infinite before the first epoch."""
        return loss_of(self.best) if self.history else math.inf


def loss_of(row: Mapping[str, Any]) -> float:
    """What an epoch is judged by: its validation loss, where there is one."""
    return float(row.get("validation_loss", row["train_loss"]))


def read_history(weights: Path) -> tuple[dict[str, Any], ...]:
    """The epochs behind a run."""
    metrics = weights.with_suffix(".run") / "metrics.jsonl"
    return (
        tuple(json.loads(row) for row in metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else ()
    )


def results(folder: Path) -> list[Result]:
    """All runs of a sweep, the best first.

    Raises:
        DataError: no sweep in the folder.
    """
    path = folder / RUNS
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        words = shlex.split(line)
        given = dict(zip((w.lstrip("-") for w in words[::2]), words[1::2], strict=True))
        weights = folder / Path(given.pop("model_path")).name
        history = read_history(weights)
        name = weights.stem.removeprefix("model_")
        found.append(Result(name, weights, given, history, state_of(weights, history)))
    if not found:
        raise DataError(f"no sweep in {folder}: {RUNS} is missing or empty")
    return sorted(found, key=lambda result: result.loss)


def table(found: Sequence[Result]) -> str:
    """Results as .csv text, a column per setting."""
    keys = list(dict.fromkeys(key for result in found for key in result.settings))
    measure = "validation_mae" if any("validation_mae" in r.best for r in found) else "validation_accuracy"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *keys, "epochs", "best_epoch", measure, "validation_loss", "finished"])
    for r in found:
        told = [r.best.get("epoch", ""), r.best.get(measure, ""), r.best.get("validation_loss", "")]
        values = [f"{v:.6g}" if isinstance(v, float) else v for v in told]
        ended = {"finished": "yes", "unfinished": "no"}.get(r.state, r.state)
        writer.writerow([r.name, *(r.settings.get(k, "") for k in keys), r.epochs, *values, ended])
    return text.getvalue()


def best_of(found: Sequence[Result], count: int = 1) -> list[Result]:
    """The finished runs with the lowest validation losses, the best first.

    Raises:
        DataError: fewer have finished.
        UsageError: none is asked for.
    """
    if count < 1:
        raise UsageError(f"--best must be at least 1, found {count}")
    done = [result for result in found if result.state == "finished"]
    if len(done) < count:
        some = f"only {len(done)}" if done else "none"
        raise DataError(f"{some} of the {len(found)} runs have finished" + (f", {count} are asked for" if done else ""))
    return done[:count]


def state_of(weights: Path, history: Sequence[Mapping[str, Any]]) -> str:
    """Whether a run is "finished", "pruned" or "unfinished", by what it has left."""
    run = weights.with_suffix(".run")
    if (run / PRUNED).exists():
        return "pruned"
    under_way = not history or (run / "checkpoint.pt").exists() or not _ended(weights, history)
    return "unfinished" if under_way else "finished"


def _ended(weights: Path, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all epochs are behind a run, or it stopped early: a run in progress, or killed, has weights too."""
    card = weights.with_suffix(".json")
    if not weights.exists() or not card.exists():
        return False
    told = json.loads(card.read_text(encoding="utf-8"))["training"]
    patience = told.get("early_stop", 0)
    lowest = min(map(loss_of, history))
    best = max(number for number, row in enumerate(history, 1) if loss_of(row) == lowest)
    return bool(len(history) >= told["epochs"] or 0 < patience <= len(history) - best)
