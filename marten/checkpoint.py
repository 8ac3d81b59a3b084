"""The state of a run, saved so that no power cut loses it and a resumed run ends in the same bits.

`checkpoint.pt` is written to a neighbour, synced and put in place; the one before it is kept as `checkpoint.prev.pt`.
Each carries the sha256 of its own payload, so that a torn or rotten file is noticed and the other one taken.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from marten.errors import TrainingError
from marten.files import replacing

_MAGIC = b"marten-checkpoint/1\n"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Put `state` (tensors and plain Python only) at `path`, keeping the file before it.

    Raises:
        MartenError: the folder cannot be written; both older files are then as they were.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    payload = buffer.getvalue()
    with replacing(path) as neighbour:
        with open(neighbour, "wb") as file:
            # the payload comes first, so that torch.load opens the file as it is; zip readers skip what follows
            file.write(payload)
            file.write(_MAGIC + hashlib.sha256(payload).hexdigest().encode())
        if path.exists():
            _keep(path)


def load_checkpoint(path: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest whole state beside `path`, and the file it came from; None when there is none to find.

    Looks at `path`, at its predecessor, and at both names in the current folder, where HTCondor puts a checkpoint
    whose folder it flattened. What others have called so there, outside of HTCondor's jobs, is left alone.

    Raises:
        TrainingError: checkpoints are there and every one is damaged.
    """
    damaged = []
    for candidate in _candidates(path):
        if not candidate.is_file():
            continue
        state = _read(candidate)
        if state is not None:
            return state, candidate
        if candidate.parent == path.parent or "_CONDOR_SCRATCH_DIR" in os.environ:
            damaged.append(candidate)
    if damaged:
        names = ", ".join(map(str, damaged))
        raise TrainingError(f"damaged checkpoints, none can be resumed from: {names}. Remove them to start anew")
    return None


def paths_of(path: Path) -> list[Path]:
    """Where a run keeps its state: the newest, and the one before it."""
    return [path, _previous(path)]


def _candidates(path: Path) -> list[Path]:
    here = paths_of(path)
    return here + [Path(p.name) for p in here if Path(p.name).resolve() != p.resolve()]


def _previous(path: Path) -> Path:
    return path.with_suffix(".prev" + path.suffix)


def _keep(path: Path) -> None:
    """Make the present checkpoint the previous one without a moment in which it has no name."""
    spare = path.with_suffix(".spare")
    spare.unlink(missing_ok=True)
    os.link(path, spare)
    os.replace(spare, _previous(path))


def _read(path: Path) -> dict[str, Any] | None:
    data = path.read_bytes()
    trailer = len(_MAGIC) + 64
    payload, end = data[:-trailer], data[-trailer:]
    if not end.startswith(_MAGIC) or end[len(_MAGIC) :] != hashlib.sha256(payload).hexdigest().encode():
        return None
    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state if isinstance(state, dict) else None
