"""One run at a time in a run's folder: a lock that ends with its process, however that ends.

The kernel keeps the lock, not the file: one that a dead process left behind holds nobody up, on this machine, on NFS
or in a sandbox that HTCondor brought back. On a file system without locks there is none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from marten.errors import MartenError, TrainingError

_LEASE_S = 120.0
"""For how long a file server may keep the lock of a machine that died (NFS: 90 s)."""


@contextlib.contextmanager
def alone(folder: Path, patience_s: float = _LEASE_S) -> Iterator[None]:
    """Hold `folder/lock` within; the file goes away afterwards.

    Args:
        folder: made where it is missing.
        patience_s: how long to wait for one that another machine holds, which may have died. The kernel knows all
            about this machine's processes, and there is nothing to wait for.

    Raises:
        TrainingError: another process holds it; says which.
        MartenError: the folder cannot be written.
    """
    path = folder / "lock"
    until = time.monotonic() + patience_s
    while (held := _try(path)) is None:
        host, holder = _holder(path)
        if host == socket.gethostname() or time.monotonic() >= until:
            raise TrainingError(
                f"{holder} is training into {folder}: wait for its end, or give this run another --model_path"
            )
        time.sleep(1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(held)


def _try(path: Path) -> int | None:
    """An open file that holds the lock; None where another process does."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise MartenError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            # not flock, which loader processes would inherit and keep
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(file)
            return None
        except OSError:
            return file  # this file system keeps no locks
        if not _is_at(path, file):
            os.close(file)  # its holder took the file away just now
            continue
        with contextlib.suppress(OSError):  # a full disk: the name of the holder is a courtesy
            os.truncate(file, 0)
            os.write(file, f"{socket.gethostname()} {os.getpid()}\n".encode())
        return file


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.fstat(file).st_ino == path.stat().st_ino
    except OSError:
        return False


def _holder(path: Path) -> tuple[str, str]:
    """Whose lock it is: (host, words for a person)."""
    with contextlib.suppress(OSError, ValueError):
        host, pid = path.read_text().split()
        return host, f"process {pid} on {host}"
    return socket.gethostname(), "another process"
