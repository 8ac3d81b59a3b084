"""Training's pictures per second, in turns with its two limits: the loader alone, and the network alone.

Where both use the same processor the two limits cannot be had at once. Then the bound is 1 / (1/loader + 1/network);
with the network on a GPU it is the smaller of the two.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from marten.batches import Batch
from marten.bench.load import draw_photograph, median
from marten.files import replacing, write_text
from marten.settings import Settings
from marten.training import Run

LOADER, NETWORK, TRAINING = "loader alone", "network alone", "training"
_DRAWN = 256


@dataclass(frozen=True)
class TrainingPlan:
    """What is measured.

    Attributes:
        networks: by the names that --conv_net takes.
        rounds: turns of loader, network and training.
        seconds: each turn lasts at least; a turn ends with a whole batch.
        batch_size: pictures per step.
        folder: of pictures to train on; None draws some.
    """

    networks: Sequence[str] = ("base_cnn", "resnet18")
    rounds: int = 3
    seconds: float = 5.0
    batch_size: int = 32
    folder: Path | None = None


@dataclass(frozen=True)
class TrainingFigure:
    """Medians of one network over the rounds; shares and ratios are of turns within the same round.

    Attributes:
        loader, network, training: pictures per second.
        of_bound: training, in shares of what loader and network allow together.
        of_network: training, in shares of the network's own pace.
        waited: share of training's time in which no batch was ready.
    """

    name: str
    loader: float
    network: float
    training: float
    of_bound: float
    of_network: float
    waited: float


def bench_training(plan: TrainingPlan, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure every network; takes networks x rounds x 3 x seconds, and some seconds of starting for each.

    Args:
        plan: what is measured.
        say: is told each figure as soon as it is known.

    Returns:
        One dict per turn: network, what, round, images_s, waited (share of the time), device, machine_load.

    Raises:
        MartenError: pictures or networks that cannot be trained.
    """
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mb-") as name:
        folder = plan.folder or _draw(Path(name) / "pictures")
        for network in plan.networks:
            weights = Path(name) / f"model_{network}.pth"
            settings = Settings(network, str(folder), str(weights), batch_size=plan.batch_size, weights="none")
            run = Run(settings)
            say(f"{network} on {run.runtime}")
            try:
                records += _take_turns(plan, network, run, say)
            finally:
                run.batches.close()
                run.held_out.close()
    return records


def _take_turns(plan: TrainingPlan, network: str, run: Run, say: Callable[[str], None]) -> list[dict[str, Any]]:
    batches = _Endless(run)
    kept = batches.next()
    steps: dict[str, Callable[[], Batch]] = {
        LOADER: batches.next,
        NETWORK: lambda: _learn(run, kept),
        TRAINING: lambda: _learn(run, batches.next()),
    }
    for step in steps.values():  # nobody's first batches count
        step()
    records = []
    for turn in range(plan.rounds):
        for what, step in steps.items():
            batches.refill()
            batches.waited_s = 0.0
            begun, pictures = time.perf_counter(), 0
            while time.perf_counter() < begun + plan.seconds:
                pictures += step()[2]
            _finish(run)
            seconds = time.perf_counter() - begun
            record = {"network": network, "what": what, "round": turn, "images_s": pictures / seconds}
            record |= {"waited": batches.waited_s / seconds, "device": run.runtime.device.type}
            records.append({**record, "machine_load": os.getloadavg()[0]})
            say(f"{network} {what:13s} {pictures / seconds:8.1f} images/s")
    return records


class _Endless:
    """The run's batches, epoch after epoch, and how long they were waited for."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._epoch = 0
        self._batches = run.batches.epoch(0)
        self.waited_s = 0.0

    def next(self) -> Batch:
        begun = time.perf_counter()
        batch = next(self._batches, None)
        if batch is None:
            self._epoch += 1
            self._batches = self._run.batches.epoch(self._epoch)
            batch = next(self._batches)
        self.waited_s += time.perf_counter() - begun
        return batch

    def refill(self) -> None:
        """Wait for one batch, so that each turn begins with loader processes that are at work already."""
        self.next()


def _learn(run: Run, batch: Batch) -> Batch:
    pixels_NHWC, labels_N, whole = batch
    run.learner.learn(pixels_NHWC, labels_N, whole, 0, 1_000_000, run.running)
    return batch


def _finish(run: Run) -> None:
    if run.runtime.device.type == "cuda":
        torch.cuda.synchronize()


def _draw(folder: Path) -> Path:
    """Two classes of drawn photographs, 500 x 375 pixels."""
    for number in range(_DRAWN):
        path = folder / "ab"[number % 2] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw_photograph(number))
    return folder


def training_figures(records: Sequence[dict[str, Any]]) -> list[TrainingFigure]:
    """Medians over the rounds, one for each network."""
    found = []
    for network in dict.fromkeys(record["network"] for record in records):
        mine = [record for record in records if record["network"] == network]
        turns = {what: [r for r in mine if r["what"] == what] for what in (LOADER, NETWORK, TRAINING)}
        paces = {what: [r["images_s"] for r in those] for what, those in turns.items()}
        shared = turns[TRAINING][0]["device"] == "cpu"
        rounds = list(zip(*paces.values(), strict=True))
        bounds = [1 / (1 / loader + 1 / net) if shared else min(loader, net) for loader, net, _ in rounds]
        found.append(
            TrainingFigure(
                network,
                median(paces[LOADER]),
                median(paces[NETWORK]),
                median(paces[TRAINING]),
                median([both / bound for (_, _, both), bound in zip(rounds, bounds, strict=True)]),
                median([both / net for _, net, both in rounds]),
                median([r["waited"] for r in turns[TRAINING]]),
            )
        )
    return found


def training_table(figures: Sequence[TrainingFigure]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| network | loader alone, images/s | network alone | training | ÷ what both allow | ÷ network | waited |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in figures:
        paces = f"{one.loader:.1f} | {one.network:.1f} | {one.training:.1f}"
        lines.append(f"| {one.name} | {paces} | {one.of_bound:.2f} | {one.of_network:.2f} | {one.waited:.0%} |")
    return lines


def write_training(records: Sequence[dict[str, Any]], about: dict[str, Any], folder: Path) -> list[Path]:
    """Write training.json and training.png; returns their paths.

    Raises:
        MartenError: the folder cannot be written.
    """
    paths = [folder / "training.json", folder / "training.png"]
    write_text(paths[0], json.dumps({"machine": about, "records": list(records)}, indent=1) + "\n")
    _plot(training_figures(records), paths[1])
    return paths


def _plot(figures: Sequence[TrainingFigure], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.8 + 2.2 * len(figures), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, what in enumerate(("loader", "network", "training")):
        places = [k + 0.26 * (i - 1) for k in range(len(figures))]
        bars = axes.bar(places, [getattr(one, what) for one in figures], 0.25, label=(LOADER, NETWORK, TRAINING)[i])
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(figures)), [one.name for one in figures])
    axes.set_ylabel("images per second")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    with replacing(path) as neighbour:
        figure.savefig(neighbour, format="png", dpi=110)
