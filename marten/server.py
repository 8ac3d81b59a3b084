"""TorchServe as one command: started until every model answers, looked after, ended without leftovers.

It runs the very `torchserve --start` that a person would type, with a private folder for what TorchServe writes
(its process id, worker sockets, unpacked archives, logs), so that several servers can run side by side.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from marten.drain import drain
from marten.errors import ServerError
from marten.files import ROOT, write_text
from marten.fitting import available_cores, fit_shared_cores
from marten.java import Java, find_java
from marten.readiness import Address, ModelStatus, ask_model, check_models, is_loaded, set_workers, worker_pids
from marten.runtime import Running, clear, find_process, find_running, locked, runtime_folder
from marten.serverconfig import Settings
from marten.serverlog import WORKER_DIED, load_failure, start_failure

if TYPE_CHECKING:
    import psutil

LOG_CONFIG = ROOT / "deployment" / "log4j2.xml"
START_TIMEOUT_S = 120.0
DRAIN_S = 20.0
_GONE_WITHIN_S = 5.0
_LAUNCH_S = 60.0
_TICK_S = 0.1
_LOG_LAG_S = 3.0
# what TorchServe and its workers import; a worker that lacks one dies while /ping says Healthy
_PACKAGES = {"ts": "torchserve", "yaml": "pyyaml", "torch": "torch", "torchvision": "torchvision"}
# set for other programs, these would make workers import other files, or TorchServe read another config
_UNWANTED = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "TS_CONFIG_FILE", "TS_MODEL_SERVER_HOME", "JAVA_HOME")


# ------------------------------------------------------------------------------------------------ start


def start(settings: Settings, timeout_s: float = START_TIMEOUT_S) -> tuple[Running, list[ModelStatus], bool]:
    """Start TorchServe and come back when every model has answered a real picture.

    Returns:
        The server, each model's answer, and whether it was already running.

    Raises:
        ServerError: what is missing or taken, or the worker's own error; nothing is left running then.
    """
    port = settings.addresses["inference"].port
    _check_packages()
    java = find_java()
    with locked(runtime_folder(port)):
        running = find_running(port)
        if running is not None:
            return running, _same_or_refuse(running, settings), True
        _check_ports(settings.addresses)
        clear(runtime_folder(port))
        pid: int | None = None
        try:
            pid = _launch(settings, java, runtime_folder(port))
            running = _remember(settings, java, pid)
            return running, _wait_until_ready(running, settings, timeout_s), False
        except BaseException as error:  # an interrupt too must leave nothing behind
            try:
                if isinstance(error, KeyboardInterrupt) and pid is not None:
                    drain(pid, port, DRAIN_S)  # a model that was quicker than the others may owe answers
            finally:
                _end(pid, runtime_folder(port))
            raise


def command(settings: Settings, folder: Path) -> list[str]:
    """The `torchserve --start` that `start` runs, as a list of words."""
    models = [f"{name}={file}" for name, file in settings.models.items()]
    return [
        *(sys.executable, "-m", "ts.model_server", "--start", "--ncs"),
        *("--ts-config", str(folder / "config.properties"), "--log-config", str(LOG_CONFIG)),
        *("--model-store", str(settings.store), "--models", *models),
    ]


def environment(java: Java, folder: Path, threads: int = 1, cores: int = 1) -> dict[str, str]:
    """What TorchServe sees: this interpreter first on the PATH, nothing that shadows an archive's files.

    Args:
        java: that runs it.
        folder: the server's private one.
        threads: of each worker, where OMP_NUM_THREADS does not say otherwise already.
        cores: of all workers together, where MARTEN_CORES does not say otherwise already.
    """
    kept = {key: value for key, value in os.environ.items() if key not in _UNWANTED}
    temp, logs = str(folder / "temp"), str(folder / "logs")
    places = {"TEMP": temp, "TMPDIR": temp, "TMP": temp, "LOG_LOCATION": logs, "METRICS_LOCATION": logs}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    fitted = {"OMP_NUM_THREADS": str(threads), "MARTEN_CORES": str(cores)}
    return {**fitted, **kept, **places, "PATH": path, **java.environment()}


def _launch(settings: Settings, java: Java, folder: Path) -> int:
    """Run `torchserve --start`, which leaves Java running and its process id in a file; returns that id."""
    for name in ("temp", "logs"):
        (folder / name).mkdir()
    cores = fit_shared_cores(len(settings.models), available_cores())
    write_text(folder / "config.properties", settings.config)
    with open(folder / "logs" / "server.log", "wb") as log:
        starter = subprocess.Popen(
            command(settings, folder),
            cwd=folder,
            env=environment(java, folder, settings.threads, cores),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C meant for us must not reach Java before its requests are answered
        )
    try:
        starter.wait(timeout=_LAUNCH_S)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(starter.pid, signal.SIGKILL)  # Java too, which it may have begun already
        starter.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise ServerError(f"torchserve --start did not come back within {_LAUNCH_S:.0f} s") from None
        raise
    try:
        return int((folder / "temp" / ".model_server.pid").read_text())
    except (OSError, ValueError):
        raise ServerError(f"torchserve --start failed: {start_failure(folder / 'logs') or 'it says nothing'}") from None


def _remember(settings: Settings, java: Java, pid: int) -> Running:
    folder = runtime_folder(settings.addresses["inference"].port)
    process = find_process(pid)
    if process is None:
        raise ServerError(f"TorchServe ended at once: {start_failure(folder / 'logs') or 'it says nothing'}")
    state = {
        "pid": pid,
        "created": process.create_time(),
        "models": list(settings.models),
        "addresses": {name: [a.host, a.port] for name, a in settings.addresses.items()},
        "fingerprint": settings.fingerprint(),
        "java": f"Java {java.version} from {java.source}",
    }
    write_text(folder / "state.json", json.dumps(state, indent=2) + "\n")
    running = find_running(settings.addresses["inference"].port)
    if running is None:
        raise ServerError(f"TorchServe ended at once: {start_failure(folder / 'logs') or 'it says nothing'}")
    return running


def _wait_until_ready(running: Running, settings: Settings, timeout_s: float) -> list[ModelStatus]:
    """Ask each model until it answers, reading the logs for the first worker that cannot load."""
    deadline = time.monotonic() + timeout_s
    statuses: dict[str, ModelStatus] = {}
    while len(statuses) < len(running.models):
        time.sleep(_TICK_S)
        if load_failure(running.logs, settings.models):
            raise ServerError(f"{_whole_failure(running, settings)} (all of it in {running.logs}/model_log.log)")
        if find_process(running.pid) is None:
            raise ServerError(f"TorchServe ended: {start_failure(running.logs) or 'it says nothing'} ({running.logs})")
        if time.monotonic() > deadline:
            late = ", ".join(name for name in running.models if name not in statuses)
            raise ServerError(f"no answer within {timeout_s:.0f} s from {late}; see {running.logs}/model_log.log")
        for name in running.models:
            if name not in statuses and is_loaded(running.addresses["management"], name):
                statuses[name] = _first_answer(running, settings, name, max(1.0, deadline - time.monotonic()))
    return [statuses[name] for name in running.models]


def _whole_failure(running: Running, settings: Settings) -> str | None:
    """Why a model did not load, once its worker's words are in the log; a busy Java tells of the death before them."""
    deadline = time.monotonic() + _LOG_LAG_S
    while True:
        time.sleep(2 * _TICK_S)
        failure = load_failure(running.logs, settings.models)
        if not failure or not failure.endswith(WORKER_DIED) or time.monotonic() > deadline:
            return failure


def _first_answer(running: Running, settings: Settings, name: str, patience_s: float) -> ModelStatus:
    """Ask a model that has just been loaded, with as many workers as were asked for."""
    inference, management = running.addresses["inference"], running.addresses["management"]
    if settings.workers not in (None, len(worker_pids(management, name))):  # its archive names another number
        set_workers(management, name, settings.workers, patience_s)
    status = ask_model(inference, name, patience_s)
    if not status.ready:
        raise ServerError(f"{name} is loaded and does not answer a picture: {status.reason} ({running.logs})")
    return status


def _same_or_refuse(running: Running, settings: Settings) -> list[ModelStatus]:
    """What the running server's models answer, if it serves just what is asked for."""
    if running.fingerprint != settings.fingerprint():
        now, wanted = ", ".join(running.models), ", ".join(settings.models)
        what = "from an older archive or config" if now == wanted else f"and not {wanted}"
        raise ServerError(f"a server is running with {now} {what}: scripts/serve restart, or --port for a second one")
    statuses = check_models(running.addresses["inference"], running.addresses["management"], running.models)
    ill = [f"{s.name}: {s.reason}" for s in statuses if not s.ready]
    if ill:
        raise ServerError(f"a server is running and not ready ({'; '.join(ill)}): scripts/serve restart")
    return statuses


def _check_packages() -> None:
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ServerError(f"{sys.executable} lacks {', '.join(missing)}: pip install -r requirements.txt")


def _check_ports(addresses: Mapping[str, Address]) -> None:
    for name, address in addresses.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address.host, address.port))
            except OSError as error:
                flag = "--port" if name == "inference" else f"--{name}_port"
                holder = _holder(address.port)
                raise ServerError(
                    f"port {address.port} ({name}) cannot be had: {error.strerror}{holder}; choose another with {flag}"
                ) from error


def _holder(port: int) -> str:
    """Name the process that listens on a port, where the system lets us see it."""
    import psutil

    try:
        pids = {
            c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.status == "LISTEN"
        }
        process = psutil.Process(next(pid for pid in pids if pid))
        words = process.cmdline()
        hand = " (TorchServe, started by hand: torchserve --stop)" if "org.pytorch.serve.ModelServer" in words else ""
        return f" by process {process.pid}, {Path(words[0]).name}{hand}"
    except (psutil.Error, StopIteration, IndexError):
        return ""


# ------------------------------------------------------------------------------------------------ stop


def stop(running: Running, drain_s: float = DRAIN_S) -> int:
    """End a server: no new requests, those begun are answered, then Java, then whatever of it is left.

    Args:
        running: what `start` gave or `find_running` found.
        drain_s: how long requests may take to be answered.

    Returns:
        How many requests were still unanswered at the end; 0 when all were drained.
    """
    with locked(running.folder):
        try:
            return drain(running.pid, running.addresses["inference"].port, drain_s)
        finally:  # an interrupt while draining ends the server at once
            _end(running.pid, running.folder)


def _end(pid: int | None, folder: Path) -> None:
    """End Java and every worker, wait until they are gone, and remove what they wrote but for the logs.

    Java is killed: what was asked has been answered by then, and its own way of ending waits 2 s twice for nothing.
    """
    import psutil

    family = ([find_process(pid)] if pid else []) + _workers(folder)
    for process in filter(None, family):
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + _GONE_WITHIN_S
    while any(process and find_process(process.pid) for process in family) and time.monotonic() < deadline:
        time.sleep(0.01)
    clear(folder, keep_logs=True)


def _workers(folder: Path) -> list[psutil.Process | None]:
    """Our processes that talk through a socket in the server's folder, whether or not their Java still lives."""
    import psutil

    sockets = str(folder / "temp" / ".ts.sock")
    found = psutil.process_iter(["cmdline"])
    return [p for p in found if any(word.startswith(sockets) for word in p.info["cmdline"] or ())]


def watch(running: Running) -> NoReturn:
    """Stay as long as TorchServe lives.

    Raises:
        ServerError: it ended by itself; its workers are ended too.
    """
    while find_process(running.pid) is not None:
        time.sleep(_TICK_S)
    _end(None, running.folder)
    raise ServerError(
        f"TorchServe (process {running.pid}) has ended, and nobody asked it to: see {running.logs}/ts_log.log"
    )
