"""How fast pictures come to a training from files, from shards and from decoded shards: the loader alone, in turns.

No network is trained, so this is the most that any GPU could be fed. Everything lies in memory after the first turn: it
tells what opening and decoding cost, not how slow a drive is.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from marten.architectures import find_architecture
from marten.batches import Batches, Pictures
from marten.bench.load import median
from marten.datasets import find_pictures, inspect
from marten.shards import read_facts, write_shards

_BATCH = 16
FILES, SHARDS, DECODED = "files", "shards", "decoded shards"


def bench_inputs(
    conv_net: str, data_dir: Path, workers: int, rounds: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure all three in turns; takes about rounds x 3 x seconds, and the packing.

    Args:
        conv_net: network whose size and preprocessing are used; pictures are augmented as in training.
        data_dir: pictures to load; twice packed into a temporary folder.
        workers: loader processes.
        rounds: turns of each.
        seconds: each turn lasts, or an epoch where that is shorter.
        say: is told each figure as soon as it is known.

    Returns:
        {"workers", "pictures", "size_mb": {contestant: MB}, "rounds": [{contestant: images per second}]}.

    Raises:
        MartenError: pictures that cannot be trained on, or a full disk.
    """
    preprocess = find_architecture(conv_net).preprocess
    with tempfile.TemporaryDirectory(prefix="mb-") as name:
        files = inspect(find_pictures(data_dir), preprocess)
        sets = {
            FILES: files,
            SHARDS: write_shards(files, Path(name, "packed")),
            DECODED: write_shards(files, Path(name, "decoded"), preprocess),
        }
        sizes = {FILES: sum(s.path.stat().st_size for s in files.samples) / 1e6}
        for kind in (SHARDS, DECODED):
            sizes[kind] = sum(shard["size_bytes"] for shard in read_facts(sets[kind].root)["shards"]) / 1e6
        loaders = {
            kind: Batches(Pictures(found.samples, preprocess, "standard", 0), _BATCH, shuffle=True, workers=workers)
            for kind, found in sets.items()
        }
        rates: list[dict[str, float]] = []
        try:
            for turn in range(rounds):
                one = {kind: _rate(loader, turn, seconds) for kind, loader in loaders.items()}
                rates.append({**one, "machine_load": os.getloadavg()[0]})
                say(f"round {turn + 1}: " + ", ".join(f"{kind} {rate:.1f}" for kind, rate in one.items()) + " images/s")
        finally:
            for loader in loaders.values():
                loader.close()
    return {"workers": workers, "pictures": len(files.samples), "size_mb": sizes, "rounds": rates}


def _rate(loader: Batches, epoch: int, seconds: float) -> float:
    """Pictures per second, from the first batch on: the start of the workers does not count."""
    batches = loader.epoch(epoch)
    next(batches)
    begun, count = time.perf_counter(), 0
    for pixels_NHWC, *_ in batches:
        count += len(pixels_NHWC)
        if time.perf_counter() - begun >= seconds:
            break
    return count / (time.perf_counter() - begun)


def inputs_table(found: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table: medians, and ratios to files with their smallest and largest."""
    lines = ["| input | size, MB | images/s | × files (least–most) |", "|---|---|---|---|"]
    for kind, size_mb in found["size_mb"].items():
        ratios = [one[kind] / one[FILES] for one in found["rounds"]]
        rate = median([one[kind] for one in found["rounds"]])
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        lines.append(f"| {kind} | {size_mb:.1f} | {rate:.1f} | {spread} |")
    return lines
