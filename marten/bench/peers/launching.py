"""Starting peers and ending them, with every process that they made."""

from __future__ import annotations

import http.client
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from marten.bench.load import Asking
from marten.bench.peers.answering import OURS, QUICKSTART, Order
from marten.errors import ServerError
from marten.files import ROOT
from marten.readiness import Address, free_ports

START_S = 300.0


@dataclass(frozen=True)
class Peer:
    """A program that serves networks.

    Attributes:
        name: as the table tells it.
        package: that must be installed.
        module: of ours that runs it.
        asking: how it wants its pictures.
    """

    name: str
    package: str
    module: str
    asking: Asking

    @property
    def installed(self) -> bool:
        """Whether it can be started here, by its quickstart: FastAPI comes along with others, but without its forms."""
        needed = (self.package, "uvicorn", "python_multipart") if self.package == "fastapi" else (self.package,)
        return all(importlib.util.find_spec(name) is not None for name in needed)

    def command(self, port: int) -> list[str]:
        """Words that start it."""
        module = f"marten.bench.peers.{self.module}"
        if self.package == "bentoml":
            return [sys.executable, "-m", "bentoml", "serve", f"{module}:Classifier", "--port", str(port)]
        return [sys.executable, "-m", module]


PEERS = (
    Peer("FastAPI", "fastapi", "with_fastapi", Asking("POST", "/predict", "form")),
    Peer("LitServe", "litserve", "with_litserve", Asking("POST", "/predict", "json")),
    Peer("BentoML", "bentoml", "with_bentoml", Asking("POST", "/predict")),
    Peer("Ray Serve", "ray", "with_ray", Asking("POST", "/")),
)


@dataclass
class RunningPeer:
    """A peer that answers."""

    name: str
    address: Address
    asking: Asking
    start_s: float
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """End it: first politely, then whatever is left of the processes that it made."""
        _end(self.process)


def launch_peer(
    peer: Peer, way: str, weights: Path, folder: Path, workers: int, threads: int, picture: bytes
) -> RunningPeer:
    """Start a peer, and come back when it has answered a picture.

    Args:
        peer: which.
        way: QUICKSTART, with one worker on torch's own threads, or OURS.
        weights: of the network, the card beside them.
        folder: for its log and what it writes.
        workers: processes that OURS has.
        threads: of each of them.
        picture: encoded, to be answered.

    Raises:
        ServerError: it ended, or does not answer; with the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    order = Order(str(weights), port, way, workers if way == OURS else 1, threads, str(folder))
    address = Address("127.0.0.1", port)
    begun = time.monotonic()
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            peer.command(port), cwd=ROOT, env=_environment(order), stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_for_answer(process, peer, address, picture, folder / "log.txt")
    except BaseException:
        _end(process)
        raise
    return RunningPeer(f"{peer.name}, {way}", address, peer.asking, time.monotonic() - begun, process)


def _environment(order: Order) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if order.way == OURS:
        kept["OMP_NUM_THREADS"] = str(order.threads)
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "RAY_USAGE_STATS_ENABLED": "0", "BENTOML_HOME": f"{order.folder}/bentoml"}
    return {**kept, **quiet, **order.variables(), "PYTHONPATH": str(ROOT)}


def _wait_for_answer(process: subprocess.Popen[bytes], peer: Peer, address: Address, picture: bytes, log: Path) -> None:
    body, headers = peer.asking.wrapped(picture)
    begun, told = time.monotonic(), "no answer"
    while time.monotonic() < begun + START_S and process.poll() is None:
        connection = http.client.HTTPConnection(address.host, address.port, timeout=START_S)
        try:
            connection.request(peer.asking.method, peer.asking.path, body, headers)
            answer = connection.getresponse()
            told = f"status {answer.status}: {answer.read()[:300]!r}"
            if answer.status == 200:
                return
        except (OSError, http.client.HTTPException) as error:
            told = repr(error)
        finally:
            connection.close()
        time.sleep(0.1)
    end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise ServerError(f"{peer.name} does not serve ({told}); its log ends with:\n{end}")


def _end(process: subprocess.Popen[bytes]) -> None:
    import psutil

    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for each in alive:
        each.kill()
    psutil.wait_procs(alive, timeout=10)


__all__ = ["OURS", "PEERS", "QUICKSTART", "Peer", "RunningPeer", "launch_peer"]
