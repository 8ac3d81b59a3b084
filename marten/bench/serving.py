"""Our server, TorchServe's own handler and the in-process limit, asked in turns: a busy machine is fair to all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from marten.bench.contestants import EXACT, FAST, FITTED, STOCK, Contestant, launch, make_weights, pack
from marten.bench.limit import Limit
from marten.bench.load import TORCHSERVE, Load, draw_photograph, photographs, put_load
from marten.bench.peers.launching import OURS, PEERS, QUICKSTART, Peer, launch_peer
from marten.errors import ServerError
from marten.fitting import available_cores
from marten.readiness import request

LIMIT = "in process"
LARGE = "12 MP"
BESIDE = "beside "
"""Begins what the turns with a peer measure: each peer has turns of its own with two of our contestants."""
_LARGE_PX = (4000, 3000)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        networks: by the names that --conv_net takes.
        clients: numbers of clients that ask at once.
        rounds: turns of all contestants.
        seconds: each turn lasts.
        copies: models registered at once in the last part; 1 leaves it out.
        large: whether 12-megapixel pictures are asked about too.
        peers: packages of other programs that serve, which are measured too where they are installed.
        folder: of photographs; None draws them.
    """

    networks: Sequence[str] = ("base_cnn", "resnet18", "vgg")
    clients: Sequence[int] = (1, 8, 32)
    rounds: int = 3
    seconds: float = 5.0
    copies: int = 4
    large: bool = True
    peers: Sequence[str] = tuple(peer.package for peer in PEERS)
    folder: Path | None = None


def bench_serving(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything; takes about networks x clients x (5 + 4 x peers) x rounds x seconds, and the starts.

    Args:
        plan: what is measured.
        say: is told each figure as soon as it is known.

    Returns:
        {"records": one dict per turn, "starts": ..., "memory": ..., "answers": ...}; see `marten.bench.report`.

    Raises:
        MartenError: a server that does not start, or a folder without pictures.
    """
    found: dict[str, Any] = {"records": [], "starts": [], "memory": [], "answers": [], "engines": {}}
    bodies = photographs(plan.folder)
    with tempfile.TemporaryDirectory(prefix="mb-") as name, own_runtime(Path(name)):
        pictures = Path(name) / "pictures"
        pictures.mkdir()
        for i, body in enumerate(bodies):
            (pictures / f"{i:03d}.jpg").write_bytes(body)
        for network in plan.networks:
            folder = Path(name) / network
            folder.mkdir()
            weights = make_weights(network, folder)
            stores = {kind: pack(kind, weights, folder) for kind in (STOCK, FITTED, EXACT, FAST)}
            with contextlib.ExitStack() as stack:
                servers = [_launched(stack, kind, store) for kind, store in stores.items()]
                limit = Limit(weights, pictures, servers[-1].threads)
                stack.callback(limit.stop)
                found["engines"][network] = limit.engine
                say(f"{network}: {limit.engine}")
                for each in servers:
                    put_load(each.address, each.names, bodies, 8, 5.0)  # nobody's first answers count
                    start = {"network": network, "contestant": each.name, "start_s": each.start_s}
                    found["starts"].append(start)
                found["answers"].append({"network": network, "largest": _largest_gap(servers[-2], servers[-1], bodies)})
                take_turns(plan, network, servers, limit, bodies, found, say)
                threads = servers[-1].threads
            for peer in (peer for peer in PEERS if peer.package in plan.peers):
                if peer.installed:
                    _meet_peer(plan, network, peer, threads, stores, weights, bodies, found, say)
                else:
                    say(f"{peer.name} is left out: it is not installed (requirements-bench.txt)")
            if plan.copies > 1 and network == plan.networks[-1]:
                _register_more(plan, network, stores, bodies, found, say)
    return found


def take_turns(
    plan: Plan,
    network: str,
    servers: Sequence[Contestant],
    limit: Limit | None,
    bodies: Sequence[bytes],
    found: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Ask each server, and where there is one the limit, once in each round; another begins each."""
    large = [draw_photograph(0, _LARGE_PX)]
    for turn in range(plan.rounds):
        order = [*servers[turn % len(servers) :], *servers[: turn % len(servers)]]
        for clients in plan.clients:
            for each in order:
                load = put_load(each.address, each.names, bodies, clients, plan.seconds, pid=each.running.pid)
                _note(found, say, network, each.name, clients, "", turn, load)
            if limit is not None:
                _note(found, say, network, LIMIT, clients, "", turn, limit.round(clients, plan.seconds))
        for each in order if plan.large else ():
            load = put_load(each.address, each.names, large, 8, plan.seconds, pid=each.running.pid)
            _note(found, say, network, each.name, 8, LARGE, turn, load)


def _meet_peer(
    plan: Plan,
    network: str,
    peer: Peer,
    threads: int,
    stores: dict[str, Path],
    weights: Path,
    bodies: Sequence[bytes],
    found: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Turns of one peer, both ways, with stock and with our fast server: never more than four servers at once."""
    with contextlib.ExitStack() as stack:
        ours = {kind: _launched(stack, kind, stores[kind]) for kind in (STOCK, FAST)}
        contestants = [(kind, each.address, each.names, TORCHSERVE, each.running.pid) for kind, each in ours.items()]
        for way in (QUICKSTART, OURS):
            folder = Path(tempfile.mkdtemp(prefix="p-", dir=weights.parent.parent))  # Ray's sockets need a short path
            workers = max(1, available_cores() // threads)
            try:
                running = launch_peer(peer, way, weights, folder, workers, threads, bodies[0])
            except ServerError as error:
                say(str(error))
                continue
            stack.callback(running.stop)
            found["starts"].append({"network": network, "contestant": running.name, "start_s": running.start_s})
            contestants.append((running.name, running.address, [""], running.asking, running.process.pid))
        for _, address, names, asking, _ in contestants:
            put_load(address, names, bodies, 8, 5.0, asking)
        for turn in range(plan.rounds):
            for clients in plan.clients:
                for name, address, names, asking, pid in contestants:
                    load = put_load(address, names, bodies, clients, plan.seconds, asking, pid)
                    _note(found, say, network, name, clients, BESIDE + peer.name, turn, load)


def _register_more(
    plan: Plan,
    network: str,
    stores: dict[str, Path],
    bodies: Sequence[bytes],
    found: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """The same with one model and with several, load spread over all of them."""
    for kind in (STOCK, FAST):
        with contextlib.ExitStack() as stack:
            servers = {copies: _launched(stack, kind, stores[kind], copies) for copies in (1, plan.copies)}
            for copies, each in servers.items():
                put_load(each.address, each.names, bodies, 8, 2.0)
                found["memory"].append({"contestant": kind, "models": copies, "memory_mb": each.memory_mb()})
            for turn in range(plan.rounds):
                for copies, each in servers.items():
                    load = put_load(each.address, each.names, bodies, 8, plan.seconds)
                    _note(found, say, network, kind, 8, f"{copies} models", turn, load)


def _launched(stack: contextlib.ExitStack, kind: str, store: Path, copies: int = 1) -> Contestant:
    launched = launch(kind, store, copies)
    stack.callback(launched.stop)
    return launched


def _note(
    found: dict[str, Any],
    say: Callable[[str], None],
    network: str,
    contestant: str,
    clients: int,
    what: str,
    turn: int,
    load: Load,
) -> None:
    record = {"network": network, "contestant": contestant, "clients": clients, "what": what, "round": turn}
    found["records"].append({**record, "machine_load": os.getloadavg()[0], **asdict(load)})
    told = f"{network} {contestant:10s} {clients:2d} clients {what:8s} {load.requests_s:7.1f} req/s"
    say(f"{told}  p50 {load.p50_ms:6.0f} ms  p99 {load.p99_ms:6.0f} ms" + f"  {load.failed} FAILED" * bool(load.failed))


def _largest_gap(exact: Contestant, fast: Contestant, bodies: Sequence[bytes]) -> float:
    """How far the answers of two of our servers lie apart at most, in probability."""
    gaps: list[float] = []
    for body in bodies:
        answers = [
            dict(json.loads(request(each.address, "PUT", f"/predictions/{each.names[0]}", body, 30)[1]))
            for each in (exact, fast)
        ]
        gaps += [abs(value - answers[1][label]) for label, value in answers[0].items()]
    return max(gaps)


@contextlib.contextmanager
def own_runtime(folder: Path) -> Iterator[None]:
    """Let servers write below one folder, whatever else runs on this machine."""
    before = os.environ.get("MARTEN_RUNTIME")
    os.environ["MARTEN_RUNTIME"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("MARTEN_RUNTIME")
        if before is not None:
            os.environ["MARTEN_RUNTIME"] = before
