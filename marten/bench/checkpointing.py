"""What saving a run's state costs: the time of a checkpoint over that of an epoch between two of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marten.bench.load import median
from marten.bench.report import Row
from marten.settings import Settings
from marten.training import Run

LARGEST_SHARE = 0.02


def bench_checkpoint(
    networks: list[str], data_dir: Path, rounds: int, seconds: float, folder: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Train for a while, save, and again; with each network, from random weights.

    An epoch is taken to last as long as its training steps would at the pace that was seen; validation, which would
    make it longer, is left out. A checkpoint holds what it holds in the middle of a run: weights, Adam's two moments
    and the best weights so far. It is synced to the disk of `folder`.

    Args:
        networks: names of architectures.
        data_dir: pictures to train on.
        rounds: checkpoints of each network.
        seconds: of training before each.
        folder: on the disk to measure; nothing is left in it.
        say: called with a line on each round.

    Returns:
        For each network: its name, steps per epoch, MB of a checkpoint, and, of each round, seconds per step and
        seconds for the checkpoint.

    Raises:
        MartenError: as training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for network in networks:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            path = Path(place) / "model.pth"
            settings = Settings(conv_net=network, data_dir=str(data_dir), model_path=str(path), weights="none")
            found.append({"network": network, **_measure(Run(settings), rounds, seconds, say)})
    return found


def _measure(run: Run, rounds: int, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    steps = len(run.batches)
    run.best.weights = {name: t.cpu().clone() for name, t in run.learner.candidate.state_dict().items()}
    run.learner.begin_epoch(0)
    told: list[dict[str, float]] = []
    step, epoch, batches = 0, 0, run.batches.epoch(0)
    try:
        for number in range(rounds):
            began, done = time.monotonic(), 0
            while done < 1 or time.monotonic() - began < seconds:
                batch = next(batches, None)
                if batch is None:
                    epoch += 1
                    batches = run.batches.epoch(epoch)
                    continue
                run.learner.learn(*batch, step, 10**9, run.running)
                step, done = step + 1, done + 1
            run.running.state()  # waits for the GPU
            step_s = (time.monotonic() - began) / done
            began = time.monotonic()
            run.save()
            save_s = time.monotonic() - began
            told.append({"step_s": step_s, "save_s": save_s})
            name = run.settings.conv_net
            say(f"{name}, round {number + 1}: {1000 * step_s:.0f} ms a step, {save_s:.2f} s a checkpoint")
    finally:
        run.batches.close()
        run.held_out.close()
    size = (run.settings.run_folder / "checkpoint.pt").stat().st_size
    return {"steps": steps, "checkpoint_mb": size / 1e6, "rounds": told}


def share(found: dict[str, Any]) -> float:
    """Median over the rounds of what a checkpoint takes of an epoch, when there is one after each."""
    return median([turn["save_s"] / (turn["step_s"] * found["steps"]) for turn in found["rounds"]])


def checkpoint_table(found: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| network | checkpoint MB | checkpoint s | epoch s | share of an epoch % |", "|---|---|---|---|---|"]
    for one in found:
        save_s = median([turn["save_s"] for turn in one["rounds"]])
        epoch_s = median([turn["step_s"] for turn in one["rounds"]]) * one["steps"]
        told = f"{one['checkpoint_mb']:.0f} | {save_s:.2f} | {epoch_s:.0f} | {100 * share(one):.2f}"
        lines.append(f"| {one['network']} | {told} |")
    return lines


def checkpoint_rows(found: list[dict[str, Any]]) -> list[Row]:
    """The figure to reach, for each network."""
    return [
        Row(f"{one['network']}: checkpoint ÷ epoch of {one['steps']} steps", share(one), LARGEST_SHARE, False)
        for one in found
    ]
