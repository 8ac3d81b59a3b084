"""Hand a running TorchServe from one version of a model to the next, without a request lost or a moment's gap.

The new version is loaded beside the old one and asked a picture; only then do answers come from it, and only when
nothing can be waiting for the old one any more is that removed. Whatever goes wrong before leaves the old one serving.
For that time both are in memory.
"""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from marten.errors import ServerError
from marten.files import write_text
from marten.manifest import archive_version, check_digest
from marten.readiness import Address, ask_model, request, worker_pids
from marten.runtime import Running
from marten.serverconfig import parse_properties
from marten.serverlog import last_words

LOAD_TIMEOUT_S = 120.0
_TICK_S = 0.1
_DEFAULT_RESPONSE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Handover:
    """What became of one endpoint.

    Attributes:
        before: version that answered.
        now: version that answers; the same where nothing had to be done.
        freed: whether the one before has left the memory.
    """

    before: str
    now: str
    freed: bool = True


def can_roll_out(running: Running) -> bool:
    """Whether a server was started with TorchServe's model API, which loads and removes versions while it runs."""
    properties = parse_properties(str(running.fingerprint["config"]))
    return properties.get("enable_model_api", "false").lower() == "true"


def roll_out(running: Running, file: str, timeout_s: float = LOAD_TIMEOUT_S) -> dict[str, Handover]:
    """Let every endpoint of an archive be answered by what lies in the store now.

    Args:
        running: the server.
        file: name of the archive in its store, for instance "vgg.mar".
        timeout_s: longest wait for the new version to load, and for the old one's last answers.

    Returns:
        What became of each endpoint, by name.

    Raises:
        ServerError: the server does not serve that archive, has no model API, or the new version does not load or
            answer; the old one then goes on.
        ArchiveError: the archive is not what its manifest says.
    """
    archives: dict[str, list[Any]] = dict(running.fingerprint["archives"])
    endpoints = [name for name, archive in archives.items() if Path(archive[0]).name == file]
    if not endpoints:
        raise ServerError(f"the server on {running.addresses['inference'].url} does not serve {file}")
    if not can_roll_out(running):
        raise ServerError(
            "the running server was started without TorchServe's model API, so it keeps what it has: "
            "scripts/serve restart, or set enable_model_api=true in its config before the next start"
        )
    done = {}
    for name in endpoints:
        mar = Path(archives[name][0])
        check_digest(mar)
        before, now = _version_in_use(running, name), archive_version(mar)
        freed = before == now or _replace(running, name, file, before, now, timeout_s)
        done[name] = Handover(before, now, freed)
        archives[name] = [str(mar), mar.stat().st_size, mar.stat().st_mtime_ns]
        _remember(running, archives)
    return done


def _replace(running: Running, name: str, file: str, old: str, new: str, timeout_s: float) -> bool:
    inference, management = running.addresses["inference"], running.addresses["management"]
    workers = len(worker_pids(management, name)) or 1
    # synchronous=true would hold one of the few threads that also read pictures, for as long as the model loads
    words = {"url": file, "model_name": name, "initial_workers": workers, "synchronous": "false"}
    try:
        failures = _load_failures(running, name)
        _manage(management, "POST", f"/models?{urlencode(words)}", timeout_s)
        _wait_until_loaded(running, name, new, failures, timeout_s)
        status = ask_model(inference, f"{name}/{new}", timeout_s)
        if not status.ready:
            raise ServerError(f"it does not answer a picture: {status.reason}")
        _manage(management, "PUT", f"/models/{name}/{new}/set-default", timeout_s)
    except BaseException as error:
        request(management, "DELETE", f"/models/{name}/{new}", timeout_s=timeout_s)
        if isinstance(error, ServerError):
            raise ServerError(f"{name} {new} cannot take over, {old} goes on: {error}") from error
        raise
    _let_finish(management, name, old, timeout_s)
    return _remove(management, name, old, timeout_s)


def _wait_until_loaded(running: Running, name: str, version: str, failures: int, timeout_s: float) -> None:
    """Wait for every worker of a version, but no longer than until TorchServe's log tells of one more failure."""
    deadline = time.monotonic() + timeout_s
    while True:
        workers = _describe(running.addresses["management"], f"{name}/{version}").get("workers", [])
        if workers and all(worker["status"] == "READY" for worker in workers):
            return
        # not by the worker's state: one that dies is started again at once, and again
        if _load_failures(running, name) > failures:
            raise ServerError(f"it does not load: {last_words(running.logs, name) or 'see ' + str(running.logs)}")
        if time.monotonic() > deadline:
            raise ServerError(f"it has not loaded within {timeout_s:.0f} s; see {running.logs}/model_log.log")
        time.sleep(_TICK_S)


def _load_failures(running: Running, name: str) -> int:
    try:
        log = (running.logs / "ts_log.log").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return 0
    return log.count(f" Load model failed: {name},")


def _let_finish(management: Address, name: str, version: str, timeout_s: float) -> None:
    """Wait until nothing waits for a version, and then as long as a worker may owe an answer."""
    deadline = time.monotonic() + timeout_s
    while True:
        told = _describe(management, f"{name}/{version}")
        waiting = int(told.get("jobQueueStatus", {}).get("pendingRequests", 0))
        if waiting == 0 or time.monotonic() > deadline:
            break
        time.sleep(_TICK_S)
    time.sleep(float(told.get("responseTimeout") or _DEFAULT_RESPONSE_TIMEOUT_S))


def _remove(management: Address, name: str, version: str, timeout_s: float) -> bool:
    """Take a version out of the server; it answers nobody any more, so a failure costs memory alone."""
    try:
        _manage(management, "DELETE", f"/models/{name}/{version}", timeout_s)
    except ServerError:  # a worker that is slow to end is told as 500, with the version gone all the same
        return version not in [each["modelVersion"] for each in _manage(management, "GET", f"/models/{name}/all", 10.0)]
    return True


def _version_in_use(running: Running, name: str) -> str:
    return str(_describe(running.addresses["management"], name)["modelVersion"])


def _describe(management: Address, path: str) -> dict[str, Any]:
    described = _manage(management, "GET", f"/models/{path}", 10.0)
    return dict(described[0])


def _manage(management: Address, method: str, path: str, timeout_s: float) -> Any:
    try:
        status, body = request(management, method, path, timeout_s=timeout_s)
        told = json.loads(body)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServerError(f"no TorchServe answers at {management.url}: {error or type(error).__name__}") from error
    if status not in (200, 202):
        message = told.get("message", "") if isinstance(told, dict) else ""
        raise ServerError(f"{method} {path.partition('?')[0]} answers {status}: {message}")
    return told


def _remember(running: Running, archives: dict[str, list[Any]]) -> None:
    """Let `scripts/serve` know that this server serves what lies in the store."""
    path = running.folder / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["fingerprint"]["archives"] = archives
    write_text(path, json.dumps(state, indent=2) + "\n")
