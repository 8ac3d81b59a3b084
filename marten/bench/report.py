"""From measured turns to medians, ratios with their spread, the figures to reach, a JSON file and a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marten.bench.contestants import FAST, STOCK
from marten.bench.load import median
from marten.bench.serving import BESIDE, LARGE, LIMIT
from marten.files import replacing, write_text

TIMES_STOCK = {"base_cnn": 4.0, "resnet18": 3.8, "vgg": 3.0}
"""Served requests per second to reach at 8 and 32 clients, in multiples of stock TorchServe's."""

Key = tuple[str, str, int, str]
"""Network, contestant, clients, what."""


@dataclass(frozen=True)
class Row:
    """One figure to reach, and what was found."""

    text: str
    found: float
    wanted: float
    at_least: bool

    @property
    def reached(self) -> bool:
        """Whether it holds."""
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return (
            f"{'reached' if self.reached else 'MISSED '}  {self.text}: {self.found:.3g} (wanted {sign} {self.wanted:g})"
        )


def grouped(records: Iterable[Mapping[str, Any]]) -> dict[Key, list[Mapping[str, Any]]]:
    """Turns by what they measured, in their order."""
    groups: dict[Key, list[Mapping[str, Any]]] = {}
    for record in records:
        key = (record["network"], record["contestant"], record["clients"], record["what"])
        groups.setdefault(key, []).append(record)
    return groups


def ratios(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], field: str = "requests_s"
) -> list[float]:
    """Of each turn: both were measured within the same minute."""
    return [a[field] / b[field] if b[field] else float("inf") for a, b in zip(ours, theirs, strict=True)]


def table(found: Mapping[str, Any], base: str = STOCK, called: str = STOCK) -> list[str]:
    """Lines of a Markdown table: medians over the rounds, ratios to `base` with their smallest and largest.

    The last column is the processor time of one answer.

    Args:
        found: what was measured, in its "records".
        base: the contestant that others are multiples of.
        called: what the table's head calls it.
    """
    groups = grouped(found["records"])
    lines = [
        f"| network | clients | server | req/s | × {called} (least–most) | p50 ms | p99 ms | processor ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (network, contestant, clients, what), turns in groups.items():
        one = groups.get((network, base, clients, what))
        told = "" if one is None else _spread(ratios(turns, one))
        figures = [median([turn[field] for turn in turns]) for field in ("requests_s", "p50_ms", "p99_ms")]
        where = f"{clients}, {what}" if what else str(clients)
        batch = contestant == LIMIT and clients > 1  # there the times are those of batches
        times = " |  |" if batch else f"{figures[1]:.0f} | {figures[2]:.0f} |"
        cost_ms = median([turn.get("cpu_ms", 0.0) for turn in turns])
        lines.append(f"| {network} | {where} | {contestant} | {figures[0]:.1f} | {told} | {times} {cost_ms:.1f} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def rows(found: Mapping[str, Any]) -> list[Row]:
    """Everything to reach that was measured; always of our server with `precision: auto`."""
    groups = grouped(found["records"])
    told = []
    for (network, contestant, clients, what), turns in groups.items():
        if contestant != FAST:
            continue
        stock = groups.get((network, STOCK, clients, what), [])
        limit = groups.get((network, LIMIT, clients, what), [])
        named = f"{network}, {clients} clients"
        if what == LARGE and stock:
            told.append(Row(f"{network}, pictures of 12 MP: req/s × stock", median(ratios(turns, stock)), 3.0, True))
        if what:
            continue
        if clients > 1 and stock and network in TIMES_STOCK:
            wanted = TIMES_STOCK[network]
            told.append(Row(f"{named}: req/s × stock", median(ratios(turns, stock)), wanted, True))
        if clients > 1 and limit:
            told.append(Row(f"{named}: req/s ÷ in process", median(ratios(turns, limit)), 0.95, True))
        if clients == 1 and limit:
            told.append(Row(f"{named}: p50 ÷ in process", median(ratios(turns, limit, "p50_ms")), 1.15, False))
        if clients == 8:
            told.append(Row(f"{named}: p99 ÷ p50", median([t["p99_ms"] / t["p50_ms"] for t in turns]), 1.5, False))
    return [*told, *_other_rows(found, groups)]


def _other_rows(found: Mapping[str, Any], groups: Mapping[Key, Sequence[Mapping[str, Any]]]) -> list[Row]:
    told = []
    starts = {(start["network"], start["contestant"]): start["start_s"] for start in found["starts"]}
    for (network, contestant), start_s in starts.items():
        if contestant == FAST:
            told.append(Row(f"{network}: start × stock", start_s / starts[network, STOCK], 1.5, False))
    told += [Row(f"{one['network']}: answers off fp32", one["largest"], 2e-3, False) for one in found["answers"]]
    memory = {(row["contestant"], row["models"]): row["memory_mb"] for row in found["memory"]}
    for (contestant, models), used in memory.items():
        if contestant == FAST and (STOCK, models) in memory:
            told.append(Row(f"{models} models: memory × stock", used / memory[STOCK, models], 1.0, False))
    for (network, contestant, clients, what), turns in groups.items():
        one = groups.get((network, contestant, clients, "1 models"))
        if contestant == FAST and one and what.endswith(" models") and what != "1 models":
            told.append(Row(f"{network}, {what}: req/s × one model", median(ratios(turns, one)), 1.6, True))
    return told


def machine() -> dict[str, Any]:
    """What the figures were measured on, without names of host or person."""
    import torch

    from marten.fitting import available_cores

    return {
        "cores": available_cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "load_before": os.getloadavg()[0],
    }


def write_report(found: Mapping[str, Any], folder: Path, say: Callable[[str], None]) -> None:
    """Write serving.json, serving.png and, where peers were met, peers.png.

    Raises:
        MartenError: the folder cannot be written.
    """
    write_text(folder / "serving.json", json.dumps(found, indent=1) + "\n")
    _plot(found, folder / "serving.png")
    say(f"wrote {folder / 'serving.json'} and {folder / 'serving.png'}")
    if any(record["what"].startswith(BESIDE) for record in found["records"]):
        _plot_peers(found, folder / "peers.png")
        say(f"wrote {folder / 'peers.png'}")


def _plot(found: Mapping[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {key: turns for key, turns in grouped(found["records"]).items() if not key[3]}
    networks = list(dict.fromkeys(key[0] for key in groups))
    contestants = list(dict.fromkeys(key[1] for key in groups))
    figure = Figure(figsize=(4.5 * len(networks), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        clients = sorted({key[2] for key in groups if key[0] == network})
        for i, contestant in enumerate(contestants):
            rates = [[turn["requests_s"] for turn in groups[network, contestant, n, ""]] for n in clients]
            middle = [median(rate) for rate in rates]
            spread = [[m - min(r) for m, r in zip(middle, rates, strict=True)]]
            spread.append([max(r) - m for m, r in zip(middle, rates, strict=True)])
            places = [k + 0.16 * (i - (len(contestants) - 1) / 2) for k in range(len(clients))]
            axes.bar(places, middle, 0.15, yerr=spread, label=contestant)
        axes.set_xticks(range(len(clients)), [str(n) for n in clients])
        axes.set_xlabel("clients")
        axes.set_ylabel("requests per second")
        axes.set_title(network)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as neighbour:
        figure.savefig(neighbour, format="png", dpi=110)


def _plot_peers(found: Mapping[str, Any], path: Path) -> None:
    """Multiples of stock of every peer and of ours, at the largest number of clients; lines from least to most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {key: turns for key, turns in grouped(found["records"]).items() if key[3].startswith(BESIDE)}
    clients = max(key[2] for key in groups)
    networks = list(dict.fromkeys(key[0] for key in groups))
    bars: dict[str, dict[str, list[float]]] = {network: {} for network in networks}
    for (network, contestant, n, what), turns in groups.items():
        if n == clients and contestant != STOCK:
            stock = groups[network, STOCK, n, what]
            bars[network].setdefault(contestant, []).extend(ratios(turns, stock))  # ours met stock beside every peer
    figure = Figure(figsize=(4.2 * len(networks) + 1, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        names = sorted(bars[network], key=lambda name: median(bars[network][name]))
        middle = [median(bars[network][name]) for name in names]
        spread = [[m - min(bars[network][name]) for name, m in zip(names, middle, strict=True)]]
        spread.append([max(bars[network][name]) - m for name, m in zip(names, middle, strict=True)])
        axes.barh(names, middle, 0.7, xerr=spread, color=["C1" if name == FAST else "C0" for name in names])
        axes.axvline(1, color="0.5", linewidth=0.8)
        axes.set_xlabel(f"requests per second × stock, {clients} clients")
        axes.set_title(network)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as neighbour:
        figure.savefig(neighbour, format="png", dpi=110)
