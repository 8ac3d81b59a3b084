"""scripts/infer against what this machine could do at most, and against the method of the original's script, in turns.

    original     marten.bench.original_infer: one process, one picture after the other
    ours fp32    scripts/infer as it is
    ours fast    scripts/infer --precision auto
    in process   marten.bench.limit: decoding and the fast engine, pictures in memory, nothing written

All rates are of answering alone, without the start of Python or the building of engines. Processor time per picture is
told beside them: on a machine that others use it hardly changes, where rates say little.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from marten.bench.contestants import make_weights
from marten.bench.limit import Limit
from marten.bench.load import median, photographs
from marten.bench.report import Row
from marten.errors import DataError
from marten.files import ROOT
from marten.fitting import available_cores

ORIGINAL, EXACT, FAST, LIMIT = "original", "ours fp32", "ours fast", "in process"
_FLAGS = {EXACT: (), FAST: ("--precision", "auto")}


def bench_inference(
    conv_net: str, pictures: int, rounds: int, seconds: float, source: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure all contestants in turns; takes about rounds x (seconds + three times what the pictures take).

    Args:
        conv_net: network, with untrained weights.
        pictures: how many each turn answers; photographs are repeated up to there.
        rounds: turns of each.
        seconds: each turn of the in-process limit lasts.
        source: folder of photographs; None draws them.
        say: is told each figure as soon as it is known.

    Returns:
        {"network", "pictures", "engine", "rounds": [{contestant: images per second}],
        "cpu_ms": [{contestant: milliseconds of processor time per picture}]}.

    Raises:
        DataError: a contestant failed; its own words are in it.
    """
    bodies = photographs(source)
    found: dict[str, Any] = {"network": conv_net, "pictures": pictures, "rounds": [], "cpu_ms": []}
    with tempfile.TemporaryDirectory(prefix="mb-") as name:
        few, many = Path(name, "few"), Path(name, "many")
        for folder, count in ((few, len(bodies)), (many, pictures)):
            folder.mkdir()
            for i in range(count):
                (folder / f"{i:06d}.jpg").write_bytes(bodies[i % len(bodies)])
        weights = make_weights(conv_net, Path(name))
        limit = Limit(weights, few, 1)
        try:
            found["engine"] = limit.engine
            say(f"{conv_net}: {limit.engine}")
            for turn in range(rounds):
                told = {ORIGINAL: _original(weights, many, Path(name))}
                told |= {kind: _ours(weights, many, Path(name), flags) for kind, flags in _FLAGS.items()}
                load = limit.round(available_cores() + 1, seconds)
                told[LIMIT] = load.requests_s, load.cpu_ms
                rates = {kind: rate for kind, (rate, _) in told.items()}
                found["rounds"].append({**rates, "machine_load": os.getloadavg()[0]})
                found["cpu_ms"].append({kind: cpu_ms for kind, (_, cpu_ms) in told.items()})
                each = (f"{kind} {rate:.1f} images/s, {cpu_ms:.1f} ms" for kind, (rate, cpu_ms) in told.items())
                say(f"round {turn + 1}: " + "; ".join(each))
        finally:
            limit.stop()
    return found


def inference_table(found: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table: medians, and ratios to the original with their smallest and largest."""
    lines = [
        "| contestant | images/s | × original (least–most) | processor time per picture, ms |",
        "|---|---|---|---|",
    ]
    for kind in (ORIGINAL, EXACT, FAST, LIMIT):
        ratios = _ratios(found["rounds"], kind, ORIGINAL)
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        rate, cpu_ms = (median([one[kind] for one in found[what]]) for what in ("rounds", "cpu_ms"))
        lines.append(f"| {kind} | {rate:.1f} | {spread} | {cpu_ms:.1f} |")
    return lines


def inference_rows(found: Mapping[str, Any]) -> list[Row]:
    """The figures to reach, by `--precision auto`, as those of serving are; the table tells fp32 beside it."""
    rounds, times, network = found["rounds"], found["cpu_ms"], found["network"]
    return [
        Row(f"{network}: images/s of scripts/infer ÷ in process", median(_ratios(rounds, FAST, LIMIT)), 0.9, True),
        Row(f"{network}: images/s of scripts/infer × original", median(_ratios(rounds, FAST, ORIGINAL)), 3.0, True),
        Row(f"{network}: processor time in process ÷ scripts/infer", median(_ratios(times, LIMIT, FAST)), 0.9, True),
    ]


def _ratios(rounds: Sequence[Mapping[str, float]], ours: str, theirs: str) -> list[float]:
    return [one[ours] / one[theirs] for one in rounds]


def _original(weights: Path, pictures: Path, folder: Path) -> tuple[float, float]:
    words = ["-m", "marten.bench.original_infer", str(weights), str(pictures), str(folder / "original.csv")]
    told = json.loads(_run(words).splitlines()[-1])
    return float(told["images_s"]), float(told["cpu_ms"])


def _ours(weights: Path, pictures: Path, folder: Path, flags: Sequence[str]) -> tuple[float, float]:
    output = folder / "ours.csv"
    words = [str(ROOT / "scripts" / "infer"), str(pictures), "--model_path", str(weights), "--output", str(output)]
    told = _run([*words, "--format", "all", *flags])
    rate = re.search(r"\(([\d.]+) images/s on \w+, ([\d.]+) ms", told)
    if rate is None:
        raise DataError(f"scripts/infer told no rate: {told[-300:]}")
    output.unlink()
    return float(rate[1]), float(rate[2])


def _run(words: Sequence[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"{' '.join(words[:3])} failed: {done.stderr.strip()[-300:]}")
    return done.stdout
