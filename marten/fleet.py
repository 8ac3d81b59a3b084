"""Several TorchServes behind one front door: started, replaced one by one without losing a request, ended.

The replicas listen on loopback, each in a private folder of its own as `marten.server` has it; the door's folder holds
Envoy's files and the list of them. A second program finds everything again from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from marten import envoy, server
from marten.errors import MartenError, ServerError, UsageError
from marten.files import MODEL_STORE, write_text
from marten.fitting import available_cores, available_memory, fit_workers, has_gpu
from marten.frontdoor import Door, is_loopback, set_replicas, write_config
from marten.readiness import Address, ModelStatus, check_models, free_ports, worker_pids
from marten.runtime import Running, clear, find_process, find_running, locked, runtime_folder
from marten.serverconfig import CONFIG, INTERFACES, Settings, bound_host, parse_properties, read_settings

MOST_IN_FLIGHT = 32
"""Pictures of a model under way in one replica at most: half of `job_queue_size`, so that it can take a dead one's."""

LEAST_IN_FLIGHT = 8
"""And at least: two batches."""

_HERE = "127.0.0.1"
_TICK_S = 0.05
_WATCH_S = 0.5
_AGAIN_S = 5.0
_SEEN_WITHIN_S = 20.0


@dataclass(frozen=True)
class Crew:
    """What each replica serves, and with what; as the flags of scripts/serve name it."""

    models: Sequence[str] = ()
    store: Path = MODEL_STORE
    config: Path = CONFIG
    workers: int | None = None
    number_of_gpu: int | None = None

    def settings(self, replicas: int) -> Settings:
        """Settings of one of several replicas, on free ports; its workers are its share of the machine's.

        Raises:
            UsageError: a config that TorchServe would show to the network.
        """
        ports = dict(zip(INTERFACES, free_ports(len(INTERFACES)), strict=True))
        found = read_settings(self.models, self.store, self.config, ports, self.workers, self.number_of_gpu)
        bound = parse_properties(found.config)
        shown = [name for name in INTERFACES if not is_loopback(bound_host(bound, name))]
        if shown:
            raise UsageError(f"{self.config} shows {', '.join(shown)} to the network, past the door: bind 127.0.0.1")
        if self.workers is None and replicas > 1 and not (has_gpu() and self.number_of_gpu != 0):
            share = fit_workers(replicas * len(found.models), available_cores(), available_memory())
            found = read_settings(self.models, self.store, self.config, ports, share, self.number_of_gpu)
        return found


@dataclass(frozen=True)
class Fleet:
    """A front door that is open, and the inference ports of the replicas behind it; none where they run elsewhere."""

    folder: Path
    pid: int
    created: float
    url: str
    models: tuple[str, ...]
    replicas: tuple[int, ...]

    @property
    def admin(self) -> Path:
        """Envoy's private socket."""
        return self.folder / "admin.sock"

    @property
    def port(self) -> int:
        """Where the door listens."""
        return int(self.url.rpartition(":")[2])

    @property
    def logs(self) -> Path:
        """Where access.jsonl and envoy.log are."""
        return self.folder / "logs"

    def running(self) -> list[Running]:
        """The replicas that live."""
        return [found for port in self.replicas if (found := find_running(port))]

    def known(self) -> dict[str, bool]:
        """HOST:PORT of each replica that the door knows, with whether it finds every model there healthy.

        Raises:
            OSError: the door does not answer.
        """
        found: dict[str, bool] = {}
        for line in envoy.ask_admin(self.admin, "/clusters").splitlines():
            place, mark, flags = line.partition("::health_flags::")
            model, _, address = place.partition("::")
            if mark and model in self.models:
                found[address] = found.get(address, True) and flags == "healthy"
        return found

    def is_healthy(self, port: int) -> bool:
        """Whether the door finds a replica of this machine healthy."""
        return self.known().get(f"{_HERE}:{port}", False)


def start(door: Door, crew: Crew, replicas: int = 1, timeout_s: float = server.START_TIMEOUT_S) -> Fleet:
    """Start the replicas, then the door, and come back when it finds all of them healthy.

    Raises:
        ServerError: a replica or the door does not start; nothing is left running then.
    """
    with _place(door) as folder:
        started: list[Running] = []
        try:
            in_flight = 0
            for _ in range(replicas):
                running, statuses, _ = server.start(crew.settings(replicas), timeout_s)
                started.append(running)
                in_flight += _fit_in_flight(statuses, running)
            addresses = [running.addresses["inference"] for running in started]
            door = dataclasses.replace(door, in_flight=in_flight)
            return _open(door, started[0].models, addresses, tuple(a.port for a in addresses), folder)
        except BaseException:
            for running in started:
                server.stop(running, 0)
            raise


def open_before(door: Door, models: Sequence[str], addresses: Sequence[Address]) -> Fleet:
    """Open a door before TorchServes that run elsewhere, on other machines say, and are nobody's here to start or end.

    Raises:
        ServerError: the door does not open, or does not find all of them healthy.
    """
    with _place(door) as folder:
        door = dataclasses.replace(door, in_flight=len(addresses) * (LEAST_IN_FLIGHT + MOST_IN_FLIGHT) // 2)
        return _open(door, tuple(models), addresses, (), folder)


@contextlib.contextmanager
def _place(door: Door) -> Iterator[Path]:
    """The folder of a door to be opened, held for as long as that takes."""
    folder = runtime_folder(door.address.port)
    envoy.find_envoy()
    with locked(folder):
        if find(door.address.port) or find_running(door.address.port):
            raise ServerError(f"a server is running on port {door.address.port}: stop it first, or expose another port")
        clear(folder)
        (folder / "logs").mkdir(exist_ok=True)
        yield folder


def _open(
    door: Door, models: tuple[str, ...], addresses: Sequence[Address], replicas: tuple[int, ...], folder: Path
) -> Fleet:
    """Start Envoy, and come back when it finds every replica healthy; nothing of it is left running otherwise."""
    pid = envoy.launch(write_config(door, models, addresses, folder), folder / "logs", min(4, available_cores()))
    try:
        process = find_process(pid)
        if process is None:
            raise ServerError(f"Envoy ended at once: {_last_line(folder / 'logs' / 'envoy.log')}")
        fleet = Fleet(folder, pid, process.create_time(), door.url, models, replicas)
        _save(fleet)
        _wait_until_known(fleet, [f"{address.host}:{address.port}" for address in addresses])
        return fleet
    except BaseException:
        envoy.drain(folder / "admin.sock", pid, 0)
        clear(folder, keep_logs=True)
        raise


def find(port: int) -> Fleet | None:
    """The fleet whose door `start` opened on this port, or None when it is not there any more."""
    folder = runtime_folder(port)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        fleet = Fleet(
            folder, state["pid"], state["created"], state["url"], tuple(state["models"]), tuple(state["replicas"])
        )
    except (OSError, ValueError, KeyError):
        return None
    return fleet if find_process(fleet.pid, fleet.created) else None


def update(
    fleet: Fleet,
    crew: Crew,
    timeout_s: float = server.START_TIMEOUT_S,
    drain_s: float = server.DRAIN_S,
    say: Callable[[str], None] = lambda line: None,
) -> Fleet:
    """Put a new replica, with the archives as they are now, in the place of each old one, one after the other.

    The new one must answer before the old one is told no more pictures and has answered its last; so there is memory
    needed for one replica more. A new one that does not start leaves the old ones as they were.

    Raises:
        ServerError: a new replica does not start, or the door does not see it.
        UsageError: other models than the door has routes for.
    """
    if not fleet.replicas:
        raise UsageError("the replicas run elsewhere: update them there, one after the other")
    with locked(fleet.folder):
        for old in fleet.replicas:
            settings = crew.settings(len(fleet.replicas))
            if set(settings.models) != set(fleet.models):
                raise UsageError(
                    f"the door has routes for {', '.join(fleet.models)}: stop, and start with other models"
                )
            fleet, late = _replace(fleet, old, settings, timeout_s, drain_s)
            say(f"replica {old} replaced by {fleet.replicas[-1]}" + f", {late} requests cut off" * bool(late))
    return fleet


def _replace(fleet: Fleet, old: int, settings: Settings, timeout_s: float, drain_s: float) -> tuple[Fleet, int]:
    """Start a replica, let the door know, take an old one away; returns requests of the old one that were cut off."""
    new, _, _ = server.start(settings, timeout_s)
    port = new.addresses["inference"].port
    try:
        _announce(fleet, [*fleet.replicas, port])
        _wait_until_known(fleet, [f"{_HERE}:{port}"])
    except BaseException:
        _announce(fleet, fleet.replicas)
        server.stop(new, drain_s)
        raise
    fleet = dataclasses.replace(fleet, replicas=(*(p for p in fleet.replicas if p != old), port))
    _announce(fleet, fleet.replicas)
    _save(fleet)
    _wait_until_known(fleet, [f"{_HERE}:{each}" for each in fleet.replicas], but_not=f"{_HERE}:{old}")
    gone = find_running(old)
    return fleet, server.stop(gone, drain_s) if gone else 0


def mend(fleet: Fleet, crew: Crew, timeout_s: float = server.START_TIMEOUT_S) -> Fleet:
    """Start a replica for each one that has died, and tell the door.

    Raises:
        ServerError: one does not start, or another program is changing the replicas just now.
    """
    with locked(fleet.folder):
        fleet = find(fleet.port) or fleet  # another program may have changed them
        for dead in [port for port in fleet.replicas if find_running(port) is None]:
            running, _, _ = server.start(crew.settings(len(fleet.replicas)), timeout_s)
            port = running.addresses["inference"].port
            fleet = dataclasses.replace(fleet, replicas=(*(p for p in fleet.replicas if p != dead), port))
            _announce(fleet, fleet.replicas)
            _save(fleet)
    return fleet


def watch(fleet: Fleet, crew: Crew, say: Callable[[str], None]) -> NoReturn:
    """Stay, and start anew every replica that dies; one that cannot start is tried again every few seconds.

    Raises:
        ServerError: the door itself has ended.
    """
    while find_process(fleet.pid, fleet.created) is not None:
        fleet = find(fleet.port) or fleet
        if len(fleet.running()) < len(fleet.replicas):
            try:
                fleet = mend(fleet, crew)
                say(f"started anew: {fleet.replicas[-1]}")
            except MartenError as error:
                say(str(error))
                time.sleep(_AGAIN_S)
        time.sleep(_WATCH_S)
    raise ServerError(f"Envoy (process {fleet.pid}) has ended, and nobody asked it to: see {fleet.logs}/envoy.log")


def stop(fleet: Fleet, drain_s: float = server.DRAIN_S) -> int:
    """Close the door, when what was asked has been answered, then end the replicas; returns requests cut off."""
    with locked(fleet.folder):
        late = envoy.drain(fleet.admin, fleet.pid, drain_s)
        for running in fleet.running():
            server.stop(running, 0 if late else drain_s)
        clear(fleet.folder, keep_logs=True)
    return late


def check(fleet: Fleet) -> list[ModelStatus]:
    """What every model of every replica says to a picture; a dead replica's are not ready.

    Of replicas elsewhere it tells what the door found when it last asked, a second ago at most.
    """
    statuses: list[ModelStatus] = []
    if not fleet.replicas:
        return [
            ModelStatus(f"replica {name}", well, 0.0, "" if well else "ill") for name, well in fleet.known().items()
        ]
    for port in fleet.replicas:
        running = find_running(port)
        if running is None:
            statuses += [ModelStatus(f"{name} in replica {port}", False, 0.0, "it has ended") for name in fleet.models]
            continue
        told = check_models(running.addresses["inference"], running.addresses["management"], running.models)
        statuses += [dataclasses.replace(status, name=f"{status.name} in replica {port}") for status in told]
    return statuses


def _fit_in_flight(statuses: Sequence[ModelStatus], running: Running) -> int:
    """Pictures that may be under way at once: what a replica answers in about a second, of its slowest model."""
    workers = min(len(worker_pids(running.addresses["management"], name)) for name in running.models)
    slowest_s = max(status.latency_s for status in statuses)
    return max(LEAST_IN_FLIGHT, min(MOST_IN_FLIGHT, round(workers / slowest_s)))


def _announce(fleet: Fleet, ports: Sequence[int]) -> None:
    set_replicas(fleet.folder, fleet.models, [Address(_HERE, port) for port in ports])


def _wait_until_known(fleet: Fleet, addresses: Sequence[str], but_not: str = "") -> None:
    """Until the door finds all of some replicas healthy, and knows another no more."""
    deadline = time.monotonic() + _SEEN_WITHIN_S
    known: dict[str, bool] = {}
    while True:
        with contextlib.suppress(OSError):  # it is not listening yet
            known = fleet.known()
        if all(known.get(address) for address in addresses) and but_not not in known:
            return
        if find_process(fleet.pid) is None or time.monotonic() > deadline:
            ill = ", ".join(address for address in addresses if not known.get(address)) or f"still {but_not}"
            raise ServerError(f"the door does not find healthy: {ill}; {_last_line(fleet.logs / 'envoy.log')}")
        time.sleep(_TICK_S)


def _save(fleet: Fleet) -> None:
    state = {"pid": fleet.pid, "created": fleet.created, "url": fleet.url, "models": fleet.models}
    write_text(fleet.folder / "state.json", json.dumps({**state, "replicas": fleet.replicas}, indent=2) + "\n")


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return f"{lines[-1][:300] if lines else 'it says nothing'} ({path})"
