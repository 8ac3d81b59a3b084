"""The private folder of one running server, and what is known of the process in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marten.errors import ServerError
from marten.readiness import Address

if TYPE_CHECKING:
    import psutil

_SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket; TorchServe's are <folder>/temp/.ts.sock.<number>."""


def runtime_folder(port: int) -> Path:
    """Folder of the server on one inference port, below the system's temporary folder; $MARTEN_RUNTIME moves it."""
    base = Path(os.environ.get("MARTEN_RUNTIME") or tempfile.gettempdir()).absolute()
    return base / f"marten-{os.getuid()}-{port}"


def make_private(folder: Path) -> None:
    """Create a folder that is ours alone, and refuse one that somebody else put there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise ServerError(
            f"{folder} is not a private folder of yours: remove it, or set MARTEN_RUNTIME to another place"
        )
    if len(os.fsencode(folder / "temp" / ".ts.sock.90000")) > _SOCKET_PATH_BYTES:
        raise ServerError(f"{folder} is too long a path for TorchServe's sockets: set MARTEN_RUNTIME to a shorter one")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two commands at once do not start two servers."""
    make_private(folder)
    with open(folder / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServerError(f"another scripts/serve is at work in {folder}: try again in a moment") from None
        yield


@dataclass(frozen=True)
class Running:
    """A server that `start` began and that is still there."""

    folder: Path
    pid: int
    models: tuple[str, ...]
    addresses: Mapping[str, Address]
    fingerprint: Mapping[str, Any]
    java: str

    @property
    def logs(self) -> Path:
        """Where TorchServe writes: ts_log.log, model_log.log (the workers' own words), access_log.log, server.log."""
        return self.folder / "logs"

    @property
    def store(self) -> Path:
        """Folder of its archives."""
        return Path(next(iter(self.fingerprint["archives"].values()))[0]).parent

    def model_words(self) -> list[str]:
        """What it serves, as `serve start` takes it: name=file."""
        return [f"{name}={Path(archive[0]).name}" for name, archive in self.fingerprint["archives"].items()]


def find_running(port: int) -> Running | None:
    """The server that `start` began on this inference port, or None when there is none any more."""
    folder = runtime_folder(port)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if find_process(state["pid"], state["created"]) is None:
        return None
    addresses = {name: Address(*pair) for name, pair in state["addresses"].items()}
    return Running(folder, state["pid"], tuple(state["models"]), addresses, state["fingerprint"], state["java"])


def find_process(pid: int, created: float | None = None) -> psutil.Process | None:
    """The live process of that id, and of that birth where it is given: ids are used again."""
    import psutil

    try:
        process = psutil.Process(pid)
        born_then = created is None or abs(process.create_time() - created) < 1
        return process if born_then and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def clear(folder: Path, keep_logs: bool = False) -> None:
    """Remove what a server wrote: unpacked archives, sockets, its state; with `keep_logs` its logs stay to be read."""
    (folder / "state.json").unlink(missing_ok=True)
    for name in ("temp",) if keep_logs else ("temp", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
