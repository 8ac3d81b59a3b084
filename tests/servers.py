"""Real TorchServes for the tests: archives without a network, and scripts/serve with ports and folders of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil
import pytest

from marten.readiness import Address, free_ports

ROOT = Path(__file__).resolve().parent.parent

ECHO = """
import sys, time
import where

class Echo:
    def initialize(self, context):
        pass

    def handle(self, rows, context):
        bodies = [row.get("body") or row.get("data") or b"" for row in rows]
        time.sleep(max(float(body[4:]) if bytes(body[:4]) == b"wait" else 0.0 for body in bodies))
        return [{"bytes": len(body), "python": sys.executable, "where": where.FOUND} for body in bodies]
"""
FAILING = ECHO.replace("        pass", '        raise ValueError("the card and the labels disagree")')
LACKING = "import captum_of_another_age\n" + ECHO
SLOW = ECHO.replace("        pass", "        time.sleep(60)")


def build_archive(store: Path, name: str, handler: str = ECHO) -> Path:
    """Write a .mar that holds a handler and `where.py`, and no model."""
    store.mkdir(parents=True, exist_ok=True)
    model = {"modelName": name, "handler": "handler.py", "modelVersion": "1.0"}
    manifest = {"createdOn": "06/05/2024 07:08:09", "runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    with zipfile.ZipFile(store / f"{name}.mar", "w") as archive:
        archive.writestr("handler.py", handler)
        archive.writestr("where.py", 'FOUND = "in the archive"\n')
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    return store / f"{name}.mar"


class Asked:
    """Whatever answers predictions at an address, each on a new connection."""

    @property
    def address(self) -> Address:
        raise NotImplementedError

    def ask(self, name: str, body: bytes = b"a picture", timeout_s: float = 30) -> tuple[int, bytes]:
        connection = HTTPConnection(self.address.host, self.address.port, timeout=timeout_s)
        try:
            connection.request("PUT", f"/predictions/{name}", body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@dataclass
class Serve(Asked):
    """scripts/serve with one store, one private folder and three ports of its own."""

    store: Path
    runtime: Path
    ports: list[int]

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.ports[0])

    @property
    def folder(self) -> Path:
        return self.runtime / f"marten-{os.getuid()}-{self.ports[0]}"

    @property
    def pid(self) -> int:
        return int(json.loads((self.folder / "state.json").read_text())["pid"])

    def command(self, verb: str, *words: str) -> list[str]:
        names = ("--port", "--management_port", "--metrics_port")
        flags = [word for name, port in zip(names, self.ports, strict=True) for word in (name, str(port))]
        if verb in ("start", "restart") and "--workers" not in words:
            flags += ["--workers", "1"]  # whatever the machine's cores
        return [sys.executable, str(ROOT / "scripts" / "serve"), verb, *words, "--model_store", str(self.store), *flags]

    def environment(self, **changes: str) -> dict[str, str]:
        return {**os.environ, "MARTEN_RUNTIME": str(self.runtime), **changes}

    def run(self, verb: str, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run one command to its end, within two minutes."""
        return subprocess.run(
            self.command(verb, *words), capture_output=True, text=True, timeout=120, env=self.environment(**changes)
        )

    @property
    def output(self) -> Path:
        """What `foreground` printed."""
        return self.runtime / "foreground.txt"

    def foreground(self, *words: str) -> subprocess.Popen[bytes]:
        """Start in the foreground, and come back when the models answer."""
        self.runtime.mkdir(exist_ok=True)
        with open(self.output, "wb") as output:
            process = subprocess.Popen(
                self.command("start", *words, "--foreground"), stdout=output, stderr=output, env=self.environment()
            )
        wait_until(lambda: process.poll() is not None or "stop:" in self.output.read_text(), 60)
        assert process.poll() is None, self.output.read_text()
        return process

    def leftovers(self) -> list[str]:
        """Live processes of this server, and what it left in its folder besides logs, lock and config."""
        mark = str(self.runtime)
        alive = [
            p for p in psutil.process_iter(["cmdline", "status"]) if any(mark in w for w in p.info["cmdline"] or ())
        ]
        words = [" ".join(p.info["cmdline"]) for p in alive if p.info["status"] != psutil.STATUS_ZOMBIE]
        files = [p.name for p in self.folder.glob("*") if p.name not in ("logs", "lock", "config.properties")]
        return words + files


class Clients:
    """Several clients that ask again and again, each time on a new connection, until `stop` or a refusal."""

    def __init__(self, serve: Asked, name: str, count: int, body: bytes) -> None:
        self.told: Counter[str] = Counter()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(serve, name, body)) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self, serve: Asked, name: str, body: bytes) -> None:
        while not self._ended.is_set():
            try:
                self.told[str(serve.ask(name, body)[0])] += 1
            except ConnectionRefusedError:
                self.told["refused"] += 1
                return
            except (OSError, HTTPException) as error:
                self.told[f"lost: {error!r}"] += 1
                return

    def stop(self) -> Counter[str]:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)
        return self.told


def allowed_s(alone_s: float) -> float:
    """The time that a promise allows: as promised on a machine of one's own, more on one that others keep busy."""
    return alone_s * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def wait_until(condition, within_s: float) -> float:
    """Seconds until the condition held; fails when it does not in time."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < within_s, f"not within {within_s} s"
        time.sleep(0.1)
    return time.monotonic() - begun


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A store with the archive "echo", nothing started; whatever a test starts is ended after it."""
    build_archive(tmp_path / "store", "echo")
    made = Serve(tmp_path / "store", tmp_path / "run", free_ports())
    yield made
    made.run("stop", "--drain_s", "0")
    assert made.leftovers() == []


@pytest.fixture(scope="session")
def echo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """One TorchServe for all tests that only ask it: its model "echo" tells the size of what it got."""
    base = tmp_path_factory.mktemp("echo")
    build_archive(base / "store", "echo")
    made = Serve(base / "store", base / "run", free_ports())
    (base / "shadow").mkdir()
    (base / "shadow" / "where.py").write_text('FOUND = "on an inherited PYTHONPATH"\n')
    started = made.run("start", PYTHONPATH=str(base / "shadow"), TS_CONFIG_FILE="/nowhere/config.properties")
    assert started.returncode == 0, started.stderr
    yield made
    assert made.run("stop", "--drain_s", "0").returncode == 0
    assert made.leftovers() == []
