"""One trained model under several model-config.yaml, asked in turns: which settings suit a machine and its callers."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marten.archive import plan_archive, write_archive
from marten.bench.contestants import launch
from marten.bench.load import photographs, put_load
from marten.bench.serving import Plan, own_runtime, take_turns
from marten.errors import UsageError

MOST = 6
"""Servers at once: each holds its own workers, of half a gigabyte and more."""


def bench_configs(weights: Path, configs: Sequence[Path], plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Archive a model with each configuration, serve all of them, and let them take turns.

    Args:
        weights: a state dict with its card beside it.
        configs: model-config.yaml files, each given once.
        plan: clients, rounds, seconds, folder of photographs, and whether large ones are asked about too.
        say: is told each figure as soon as it is known.

    Returns:
        {"records": one dict per turn}, its contestants the configurations; see `marten.bench.report.table`.

    Raises:
        UsageError: no configuration, one twice, or more than can be served at once.
        MartenError: weights or a configuration that cannot be archived, or a server that does not start.
    """
    names = [str(config) for config in configs]
    if not 1 <= len(set(names)) == len(names) <= MOST:
        raise UsageError(f"--model_config takes 1 to {MOST} different files, found {' '.join(names) or 'none'}")
    found: dict[str, Any] = {"records": []}
    bodies = photographs(plan.folder)
    with tempfile.TemporaryDirectory(prefix="mb-") as name, own_runtime(Path(name)), contextlib.ExitStack() as stack:
        servers = []
        for i, config in enumerate(configs):
            archive = plan_archive(weights, export_path=Path(name) / str(i), config=config, parts=Path(name) / "parts")
            archive.export_path.mkdir()
            write_archive(archive)
            servers.append(launch(names[i], archive.export_path))
            stack.callback(servers[-1].stop)
            put_load(servers[-1].address, servers[-1].names, bodies, 8, 5.0)  # nobody's first answers count
        take_turns(plan, archive.name, servers, None, bodies, found, say)
    return found
