"""Clients that ask a server again and again over one connection each, and what they saw."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import random
import socket
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from marten.errors import DataError
from marten.readiness import Address


@dataclass(frozen=True)
class Load:
    """What some clients saw together.

    Attributes:
        requests_s: answers with status 200 per second.
        p50_ms, p99_ms: of the time from asking to the last byte of the answer.
        failed: answers of another status, and broken connections.
        cpu_ms: processor time of each answer, where it was measured with it; else 0.
    """

    requests_s: float
    p50_ms: float
    p99_ms: float
    failed: int
    cpu_ms: float = 0.0


@dataclass(frozen=True)
class Asking:
    """How a server wants to be asked; as it stands, how TorchServe does.

    Attributes:
        method: of HTTP.
        path: with {name} where the model's name goes.
        wrap: "" for the picture's bytes alone, "json" for {"image": base64}, "form" for a form's field `file`.
    """

    method: str = "PUT"
    path: str = "/predictions/{name}"
    wrap: str = ""

    def wrapped(self, picture: bytes) -> tuple[bytes, dict[str, str]]:
        """Body and headers that carry one encoded picture."""
        if self.wrap == "json":
            text = json.dumps({"image": base64.b64encode(picture).decode("ascii")})
            return text.encode("ascii"), {"Content-Type": "application/json"}
        if self.wrap == "form":
            mark = "marten-picture"
            field = 'Content-Disposition: form-data; name="file"; filename="a.jpg"\r\nContent-Type: image/jpeg'
            body = f"--{mark}\r\n{field}\r\n\r\n".encode() + picture + f"\r\n--{mark}--\r\n".encode()
            return body, {"Content-Type": f"multipart/form-data; boundary={mark}"}
        return picture, {"Content-Type": "image/jpeg"} if self.method == "POST" else {}


TORCHSERVE = Asking()


class Caller:
    """One kept connection, as lean as Python allows: clients take the cores that they measure.

    http.client takes 0.25 ms for each answer here, most of it for an answer's headers; this takes 0.09.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._socket: socket.socket | None = None

    def ask(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> str:
        """Send a request and read its answer to the end; returns the status.

        Raises:
            OSError: no connection, or one that ended before the answer did.
            ValueError: an answer that is not told how long it is.
        """
        if self._socket is None:
            self._socket = socket.create_connection((self._address.host, self._address.port), timeout=60)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._address.host}:{self._address.port}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._socket.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}\r\n\r\n"]).encode() + body)
        data = self._more(b"")
        while b"\r\n\r\n" not in data:
            data = self._more(data)
        head, _, data = data.partition(b"\r\n\r\n")
        fields = head.lower() + b"\r\n"
        if b"\r\ntransfer-encoding: chunked\r\n" in fields:
            while not data.endswith(b"0\r\n\r\n"):
                data = self._more(data)
        else:
            length = int(fields.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
            while len(data) < length:
                data = self._more(data)
        if b"\r\nconnection: close\r\n" in fields:
            self.close()
        return head[9:12].decode("ascii")

    def _more(self, data: bytes) -> bytes:
        assert self._socket is not None
        found = self._socket.recv(65536)
        if not found:
            raise ConnectionError("the connection ended before the answer did")
        return data + found

    def close(self) -> None:
        """End the connection; the next request makes another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def put_load(
    address: Address,
    names: Sequence[str],
    bodies: Sequence[bytes],
    clients: int,
    seconds: float,
    asking: Asking = TORCHSERVE,
    pid: int | None = None,
) -> Load:
    """Let clients ask for some seconds, each for the models in turn, and wait for the last answers.

    With the server's `pid` the processor time of its whole family is told too: unlike rates it hardly changes on a
    machine that others use.
    """
    latencies: list[float] = []
    failures: list[str] = []
    wrapped = [asking.wrapped(body) for body in bodies]  # before the clock runs
    cpu_begun_s = 0.0 if pid is None else family_cpu_s(pid)
    begun = time.perf_counter()

    def ask(client: int) -> None:
        caller = Caller(address)
        turn = client
        while time.perf_counter() < begun + seconds:
            asked = time.perf_counter()
            path = asking.path.format(name=names[turn % len(names)])
            body, headers = wrapped[turn % len(wrapped)]
            try:
                status = caller.ask(asking.method, path, body, headers)
            except (OSError, ValueError) as error:
                status = repr(error)
                caller.close()
            if status == "200":
                latencies.append(time.perf_counter() - asked)
            else:
                failures.append(status)
            turn += clients + 1
        caller.close()

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - begun
    if not latencies:
        return Load(0.0, float("inf"), float("inf"), len(failures))
    p50_ms, p99_ms = (1000 * percentile(latencies, percent) for percent in (50, 99))
    cpu_ms = 0.0 if pid is None else 1000 * (family_cpu_s(pid) - cpu_begun_s) / len(latencies)
    return Load(len(latencies) / elapsed, p50_ms, p99_ms, len(failures), cpu_ms)


def family_cpu_s(pid: int) -> float:
    """Processor time that a process and all that it started, and that still run, have used."""
    import psutil

    first = psutil.Process(pid)
    used_s = 0.0
    for each in [first, *first.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended since
            times = each.cpu_times()
            used_s += times.user + times.system
    return used_s


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def median(values: Sequence[float]) -> float:
    """Of at least one value."""
    return float(statistics.median(values))


def photographs(folder: Path | None, count: int = 32) -> list[bytes]:
    """Encoded pictures to ask about: JPEG files of a folder, else drawn ones of 500 x 375 pixels.

    Raises:
        DataError: a folder without .jpg files.
    """
    if folder is None:
        return [draw_photograph(seed) for seed in range(count)]
    found = sorted(folder.rglob("*.jpg"))[:count]
    if not found:
        raise DataError(f"no .jpg in {folder}: give --img_path a folder of photographs, or leave it out")
    return [path.read_bytes() for path in found]


def draw_photograph(seed: int, size_px: tuple[int, int] = (500, 375)) -> bytes:
    """A JPEG with the detail, and about the bytes, of a photograph; the same for the same seed."""
    rng = random.Random(seed)

    def noise(width: int, height: int) -> Image.Image:
        patch = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
        return patch.resize(size_px, Image.Resampling.BICUBIC)

    width, height = size_px
    mixed = Image.blend(noise(8, 6), noise(min(width, 500) // 4, min(height, 375) // 4), 0.3)
    buffer = io.BytesIO()
    mixed.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
