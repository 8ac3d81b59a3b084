"""Files that are never half written, and where the project keeps them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from marten.errors import MartenError

ROOT = Path(__file__).resolve().parent.parent
"""The repository's root, which holds modelspec.py and models/."""

MODELS = ROOT / "models"
MODEL_STORE = ROOT / "deployment" / "model-store"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a private neighbour of `path` to write; on success sync it and put it in place in one step.

    Raises:
        MartenError: the folder cannot be written or the disk is full; `path` is then as it was.
    """
    path = Path(path)
    neighbour: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        neighbour = Path(name)
        yield neighbour
        with open(neighbour, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(neighbour, 0o644)
        os.replace(neighbour, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise MartenError(f"cannot write {path}: {reason}. What was there before is untouched.") from error
    finally:
        if neighbour is not None:
            neighbour.unlink(missing_ok=True)


def available_cpus() -> int:
    """Processors that this process may use: the scheduler's share where the system tells it, as macOS does not."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, never a part; see `replacing`."""
    with replacing(path) as neighbour:
        neighbour.write_text(text, encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
