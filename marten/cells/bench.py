"""Measure every step of a project on this machine: crops, checks, features, and how near they are to DeepProfiler's."""

from __future__ import annotations

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from marten.bench.report import Row
from marten.cells.errors import CellsError
from marten.cells.feature_files import npz_path
from marten.cells.index import read_index
from marten.cells.project import Project
from marten.files import ROOT

RECORDED = {"export": 64.0, "profile": 79.0}
"""Crops and cells per second of DeepProfiler 0.5 with TensorFlow 2.15 on two cores of an AMD EPYC."""


def bench_cells(project: Project, checkpoint: Path | None, repeats: int = 3) -> Iterator[str | Row]:
    """Measure in a copy of the project's tree, with links to its inputs and compressed images.

    Args:
        project: read only; its outputs stay as they are.
        checkpoint: weights to profile with; None leaves the network out.
        repeats: runs of each step, in turns; the median is told.

    Yields:
        One line per figure, as soon as it is known, and a row where there is something to reach. Times contain the
        start of the program, except those of profiling.
    """
    with _copy(project) as copy:
        yield from _bench_crops(copy, repeats)
        yield from _bench_check(copy, repeats)
        if checkpoint is not None:
            yield from _bench_profile(copy, checkpoint, repeats)
            yield from _bench_aggregate(copy, repeats)


@contextmanager
def _copy(project: Project) -> Iterator[Project]:
    folder = Path(tempfile.mkdtemp(prefix="cells-bench-"))
    try:
        (folder / "inputs").symlink_to((project.root / "inputs").resolve())
        (folder / "outputs").mkdir()
        if project.compressed_images.is_dir():
            (folder / "outputs" / "compressed").mkdir()
            (folder / "outputs" / "compressed" / "images").symlink_to(project.compressed_images.resolve())
        yield replace(project, root=folder)
    finally:
        shutil.rmtree(folder)


def _bench_crops(project: Project, repeats: int) -> Iterator[str | Row]:
    wanted = {"export, PNG, parity, 1 process": 3.0, "export, PNG, parity, 2 processes": 5.0}
    ways = {
        **{way: ("--workers", str(number)) for number, way in enumerate(wanted, 1)},
        "export, shards, parity, 2 processes": ("--workers", "2", "--format", "shards"),
        "export, shards, slice, 2 processes": ("--workers", "2", "--format", "shards", "--geometry", "slice"),
        "export, PNG again, for the check": ("--workers", "2"),
    }
    crops = 0
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, words in ways.items():
            seconds, told = _run(project, "export", "--overwrite", *words)
            times[way].append(seconds)
            crops = int(told.split()[0])
    for way, seconds_each in list(times.items())[:-1]:
        pace = crops / statistics.median(seconds_each)
        yield f"{way}: {pace:.0f} crops/s"
        if way in wanted:
            yield Row(
                f"{way}: crops/s × DeepProfiler's {RECORDED['export']:.0f}",
                pace / RECORDED["export"],
                wanted[way],
                True,
            )


def _bench_check(project: Project, repeats: int) -> Iterator[str | Row]:
    for workers in ("1", "2"):
        runs = [_run(project, "check", "--only", "crops", "--workers", workers) for _ in range(repeats)]
        crops = int(runs[0][1].split(" crops checked")[0].split()[-1])
        pace = 60 * crops / statistics.median(seconds for seconds, _ in runs)
        yield Row(f"check, processes: {workers}: crops a minute", pace, 20_000, True)


def _bench_profile(project: Project, checkpoint: Path, repeats: int) -> Iterator[str | Row]:
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    features: dict[str, Any] = {}
    cells, peak = 0, 0
    for _ in range(repeats):
        for precision, seconds_each in times.items():
            experiment = replace(project, experiment=precision)
            words = ("--exp", precision, "profile", "--checkpoint", str(checkpoint.resolve()), "--precision", precision)
            _, told = _run(project, *words, "--overwrite", "--device", "cpu")
            line = next(line for line in told.splitlines() if "cells/s" in line)
            cells, seconds = int(line.split()[0]), float(line.split(" in ")[1].split()[0])
            seconds_each.append(seconds)
            features[precision] = _all_features(experiment)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    for (precision, seconds_each), wanted in zip(times.items(), (1.0, 2.0), strict=True):
        pace = cells / statistics.median(seconds_each)
        yield f"profile, {precision}: {pace:.0f} cells/s"
        yield Row(
            f"profile, {precision}: cells/s × DeepProfiler's {RECORDED['profile']:.0f}",
            pace / RECORDED["profile"],
            wanted,
            True,
        )
    turns = [exact / short for exact, short in zip(times["fp32"], times["bf16"], strict=True)]
    yield f"profile, bf16: {statistics.median(turns):.2f} x fp32 ({min(turns):.2f}-{max(turns):.2f})"
    one, other = features["fp32"], features["bf16"]
    cosine = (one * other).sum(1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))
    yield Row(f"profile, bf16 against fp32: cosine of the worst of {len(one)} cells", float(cosine.min()), 0.999, True)
    yield f"profile: largest memory of any process {peak / 1024:.0f} MiB"


def _bench_aggregate(project: Project, repeats: int) -> Iterator[str | Row]:
    seconds = statistics.median(_run(project, "--exp", "fp32", "aggregate")[0] for _ in range(repeats))
    yield f"aggregate: {len(read_index(project).sites)} sites in {seconds:.1f} s with the program's start"


def _all_features(project: Project) -> Any:
    sites = [npz_path(project, site) for site in read_index(project).sites]
    return np.concatenate([np.load(path, allow_pickle=False)["features"] for path in sites if path.is_file()])


def _run(project: Project, *words: str) -> tuple[float, str]:
    """Run scripts/cells as a user does; returns seconds and what it printed."""
    options: list[str] = ["--root", str(project.root), "--config", project.config.source]
    command = [sys.executable, str(ROOT / "scripts" / "cells"), *options, *words]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        raise CellsError(f"{' '.join(words)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return seconds, done.stdout
