"""Whether each model answers right now: a real picture, sent as a client sends it.

TorchServe's own /ping says "Healthy" while a worker hangs or cannot load, and so does READY in its management
API; see docs/serving.md.
"""

from __future__ import annotations

import functools
import http.client
import io
import json
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from marten.errors import ServerError

PATIENCE_S = 4.0
"""Longest wait of `check_models` for an answer: a frozen worker is noticed within 5 s of asking."""


@dataclass(frozen=True)
class Address:
    """Where one of TorchServe's interfaces is reached from this machine."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """As a client writes it, without a path."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True)
class ModelStatus:
    """What one model said to one picture.

    Attributes:
        name: of the endpoint.
        ready: it answered with status 200.
        latency_s: from connecting to the last byte of the answer.
        reason: why it is not ready; empty when it is.
    """

    name: str
    ready: bool
    latency_s: float
    reason: str = ""


@functools.cache
def golden_picture() -> bytes:
    """A small JPEG drawn by program, always the same bytes: 128 x 96 pixels, a disc before a slanted sky."""
    picture = Image.linear_gradient("L").resize((128, 96)).convert("RGB")
    ImageDraw.Draw(picture).ellipse((32, 16, 96, 80), fill=(210, 120, 40), outline=(20, 30, 60), width=3)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def request(address: Address, method: str, path: str, body: bytes = b"", timeout_s: float = 10.0) -> tuple[int, bytes]:
    """Send one request, past any proxy of the environment, and read the whole answer.

    Raises:
        OSError: nothing listens, or the answer did not come in time (TimeoutError).
        http.client.HTTPException: the connection broke, or what came is no HTTP.
    """
    connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
    try:
        connection.request(method, path, body, {"Content-Type": "application/octet-stream"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def ask_model(inference: Address, name: str, timeout_s: float = PATIENCE_S) -> ModelStatus:
    """Send the golden picture to one model and judge what comes back."""
    begun = time.monotonic()
    try:
        status, body = request(inference, "PUT", f"/predictions/{name}", golden_picture(), timeout_s)
        reason = "" if status == 200 else f"status {status}: {_first_words(body)}"
    except TimeoutError:
        reason = f"no answer within {timeout_s:.0f} s"
    except (OSError, http.client.HTTPException) as error:
        reason = f"{inference.url} cannot be asked: {error or type(error).__name__}"
    return ModelStatus(name, not reason, time.monotonic() - begun, reason)


def check_models(
    inference: Address, management: Address, names: Iterable[str], timeout_s: float = PATIENCE_S
) -> list[ModelStatus]:
    """Ask every model at once, and look at every worker's process.

    A model of several workers whose one worker hangs would still answer most pictures: it is not ready either.

    Returns:
        One status for each name, in the given order.
    """
    names = list(names)

    def check(name: str) -> ModelStatus:
        status = ask_model(inference, name, timeout_s)
        if status.ready:
            frozen = [pid for pid in worker_pids(management, name, timeout_s) if _is_stopped(pid)]
            if frozen:
                return ModelStatus(name, False, status.latency_s, f"worker {frozen[0]} is frozen")
        return status

    with ThreadPoolExecutor(max(1, len(names))) as pool:
        return list(pool.map(check, names))


def served_models(management: Address, timeout_s: float = PATIENCE_S) -> list[str]:
    """Names that TorchServe has registered, sorted.

    Raises:
        ServerError: nothing answers at the management address.
    """
    return sorted(str(model["modelName"]) for model in _manage(management, "/models?limit=100", timeout_s)["models"])


def set_workers(management: Address, name: str, workers: int, timeout_s: float) -> None:
    """Give a model that many processes, whatever its archive says, and wait until they have loaded it.

    Raises:
        ServerError: TorchServe refuses, or is not ready in time.
    """
    path = f"/models/{name}?min_worker={workers}&max_worker={workers}&synchronous=true"
    _manage(management, path, timeout_s, "PUT")


def is_loaded(management: Address, name: str, timeout_s: float = PATIENCE_S) -> bool:
    """Whether every worker of a model has loaded it; false too while the management address does not answer."""
    states = [worker["status"] for worker in _workers(management, name, timeout_s)]
    return bool(states) and all(state == "READY" for state in states)


def worker_pids(management: Address, name: str, timeout_s: float = PATIENCE_S) -> list[int]:
    """Process ids of a model's workers; empty when the management address does not answer."""
    return [int(worker["pid"]) for worker in _workers(management, name, timeout_s) if worker["pid"] > 0]


def _workers(management: Address, name: str, timeout_s: float) -> list[dict[str, Any]]:
    try:
        return [
            worker for version in _manage(management, f"/models/{name}", timeout_s) for worker in version["workers"]
        ]
    except ServerError:
        return []


def _manage(management: Address, path: str, timeout_s: float, method: str = "GET") -> Any:
    try:
        status, body = request(management, method, path, timeout_s=timeout_s)
        if status == 200:
            return json.loads(body)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServerError(f"no TorchServe answers at {management.url}: {error or type(error).__name__}") from error
    raise ServerError(f"{management.url}{path} answers {status}: {_first_words(body)}")


def _is_stopped(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def _first_words(body: bytes) -> str:
    """The message of an error's JSON, else the first line, at most 200 characters."""
    text = body.decode("utf-8", "replace").strip()
    try:
        told = json.loads(text)
        text = str(told["message"]) if isinstance(told, dict) and "message" in told else text
    except ValueError:
        pass
    return (text.splitlines() or ["an empty body"])[0][:200]


def free_ports(count: int = 3) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
