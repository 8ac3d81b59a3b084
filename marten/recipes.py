"""Recipes against each other: the same network, pictures, epochs and splits, several seeds, one table."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from marten.errors import TrainingError
from marten.files import ROOT
from marten.metrics import wilson_interval
from modelspec import ModelCard


@dataclass(frozen=True)
class Outcome:
    """One run of a recipe.

    Attributes:
        recipe: name of its file.
        seed: of the split, the weights and everything else.
        hits, count: right answers of the best epoch on the validation pictures, and how many those are.
        images_per_s: median over epochs, in training.
    """

    recipe: str
    seed: int
    hits: int
    count: int
    images_per_s: float


def run_recipe(recipe: Path, seed: int, data_dir: Path, out: Path, words: Sequence[str] = ()) -> Outcome:
    """Train by a recipe with one seed, or take the finished run of the same name from `out`.

    Args:
        recipe: TOML for `train_main.py --config`.
        seed: of the run.
        data_dir: the pictures.
        out: folder of all runs; an interrupted one goes on there.
        words: further flags for every run, for instance ("--epochs", "20").

    Raises:
        TrainingError: the run failed; its own words are above.
    """
    model = out / f"{recipe.stem}-{seed}.pth"
    run_folder = model.with_suffix(".run")
    if not model.with_suffix(".json").is_file() or (run_folder / "checkpoint.pt").exists():
        command = [sys.executable, str(ROOT / "train_main.py"), "--config", str(recipe), "--data_dir", str(data_dir)]
        place = ["--seed", str(seed), "--model_path", str(model), "--checkpoint_every", "1"]
        done = subprocess.run([*command, *place, *words])
        if done.returncode:
            raise TrainingError(f"{recipe.name} with seed {seed} ended with {done.returncode}; run it again to go on")
    accuracy = ModelCard.read(model.with_suffix(".json")).metrics.get("validation_accuracy")
    if accuracy is None:
        raise TrainingError(f"{model} has no validation accuracy: compare classifiers, with --validation_split above 0")
    timing = [json.loads(line) for line in (run_folder / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    rate = statistics.median(row["images_per_s"] for row in timing)
    return Outcome(recipe.stem, seed, accuracy["hits"], accuracy["count"], rate)


def recipe_table(outcomes: Iterable[Outcome]) -> str:
    """A Markdown table: each recipe's accuracy by seed, over all seeds with its 95 % interval, and its images/s."""
    by_recipe: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_recipe.setdefault(outcome.recipe, []).append(outcome)
    lines = ["| recipe | validation accuracy by seed | all seeds, 95 % interval | images/s |", "|---|---|---|---|"]
    for recipe, runs in by_recipe.items():
        hits, count = sum(r.hits for r in runs), sum(r.count for r in runs)
        low, high = wilson_interval(hits, count)
        each = ", ".join(f"{r.hits / r.count:.3f}" for r in runs)
        rate = statistics.median(r.images_per_s for r in runs)
        lines.append(f"| {recipe} | {each} | {hits / count:.3f} [{low:.3f}, {high:.3f}] of {count} | {rate:.1f} |")
    return "\n".join(lines)
