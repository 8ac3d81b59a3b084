"""A front door with replicas behind it, opened for a while so that `marten.bench.faults` can break something."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from marten import fleet
from marten.bench.contestants import EXACT, make_weights, pack
from marten.bench.crowd import Crowd, Entrance
from marten.bench.load import photographs
from marten.bench.serving import own_runtime
from marten.credentials import open_or_make
from marten.errors import ServerError
from marten.fleet import Crew, Fleet
from marten.frontdoor import Door
from marten.readiness import Address, free_ports, worker_pids
from marten.runtime import Running

CLIENTS = 4
START_S = 400.0
"""Longest wait for a replica, on a machine that others keep busy too."""

TICK_S = 0.02


@dataclass(frozen=True)
class Lengths:
    """How long and how often; the short ones are for a look, the issue's own are the flags' business.

    Attributes:
        seconds: of each fault under load.
        every_s: between two kills.
        count: replicas ended by SIGTERM, and rolling updates.
        half_open: connections that never finish what they began.
        times: the overload, in multiples of the clients that a replica can take at once.
        rest_s: of each client of the soak after an answer, so that an hour of it leaves the machine to others.
    """

    seconds: float = 30.0
    every_s: float = 10.0
    count: int = 2
    half_open: int = 500
    times: int = 10
    rest_s: float = 0.0


@dataclass
class Stack:
    """A front door with two replicas of one network, and what its clients need."""

    fleet: Fleet
    crew: Crew
    entrance: Entrance
    bodies: Sequence[bytes]
    lengths: Lengths
    say: Callable[[str], None]
    dice: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def model(self) -> str:
        """The one that it serves."""
        return self.fleet.models[0]

    def crowd(self, clients: int = CLIENTS, pause_s: float = 0.0, rest_s: float = 0.0) -> Crowd:
        """Clients that begin to ask where `with` begins."""
        return Crowd(self.entrance, self.model, self.bodies, clients, pause_s, rest_s)

    def workers(self) -> dict[int, Running]:
        """Every worker's process id, with the replica that it belongs to."""
        replicas = self.fleet.running()
        return {pid: r for r in replicas for pid in worker_pids(r.addresses["management"], self.model)}

    def wait_until_whole(self, within_s: float = START_S) -> float:
        """Until the door finds every replica healthy; returns the seconds it took."""
        begun = time.monotonic()
        while not all(self.fleet.is_healthy(port) for port in self.fleet.replicas):
            if time.monotonic() - begun > within_s:
                raise ServerError(f"the replicas are not healthy again within {within_s:.0f} s: {self.fleet.known()}")
            time.sleep(TICK_S)
        return time.monotonic() - begun


@contextlib.contextmanager
def stacked(
    conv_net: str,
    lengths: Lengths,
    say: Callable[[str], None],
    pictures: Path | None = None,
    replicas: int = 2,
    store: Path | None = None,
) -> Iterator[Stack]:
    """Open a front door before replicas of an untrained network, or of the archives of a store; close it in the end."""
    with tempfile.TemporaryDirectory(prefix="mf-") as name, own_runtime(Path(name)):
        folder = Path(name)
        crew = Crew(store=store or pack(EXACT, make_weights(conv_net, folder), folder))
        secrets, _ = open_or_make(folder / "secrets")
        door = Door(Address("0.0.0.0", free_ports(1)[0]), folder / "secrets", per_second=1_000_000)
        begun = time.monotonic()
        opened = fleet.start(door, crew, replicas, START_S)
        say(
            f"{replicas} replicas of {', '.join(opened.models)} behind {opened.url} in {time.monotonic() - begun:.0f} s"
        )
        entrance = Entrance(opened.url, secrets.certificate, secrets.key)
        try:
            yield Stack(opened, crew, entrance, photographs(pictures), lengths, say)
        finally:
            last = fleet.find(door.address.port)
            if last is not None:
                fleet.stop(last, 2.0)


def tell(stack: Stack, what: str, crowd: Crowd) -> None:
    """Say what a crowd saw, and the first failures that are no mere refusals."""
    stack.say(f"  {what}: {crowd.summary()}")
    for each in [one for one in crowd.failed if one.status not in (429, 503)][:3]:
        stack.say(f"  failed at {time.strftime('%T', time.localtime(each.at))}: {each.status} {each.told}")
