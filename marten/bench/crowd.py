"""A crowd of clients before the front door, each request of theirs written down: when, how long, and what came back."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from marten.bench.load import percentile

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Entrance:
    """The front door as a client sees it: https://HOST:PORT, the certificate to trust, the key to send."""

    url: str
    certificate: Path
    key: str

    def context(self) -> ssl.SSLContext:
        """What checks the certificate; made once for each crowd, it is slow to make."""
        return ssl.create_default_context(cafile=str(self.certificate))

    def connect(self, context: ssl.SSLContext) -> http.client.HTTPSConnection:
        """A connection that opens at its first request."""
        where = urlsplit(self.url)
        return http.client.HTTPSConnection(where.hostname or "", where.port, timeout=TIMEOUT_S, context=context)

    def dial(self) -> socket.socket:
        """A TCP connection, without TLS as yet."""
        where = urlsplit(self.url)
        return socket.create_connection((where.hostname or "", where.port or 443), timeout=TIMEOUT_S)


@dataclass(frozen=True)
class Asked:
    """One request: when it began, how long it took, its status (0: no answer), and the text of what went wrong."""

    at: float
    took_s: float
    status: int
    told: str = ""
    retry_after: bool = False


class Crowd:
    """Clients that ask from `with` to the end of it, each over one connection that it keeps.

    Args:
        entrance: where.
        model: whom.
        bodies: pictures, in turn.
        clients: how many.
        pause_s: of each client after an answer that is no 200.
        rest_s: of each client after a 200.
    """

    def __init__(
        self,
        entrance: Entrance,
        model: str,
        bodies: Sequence[bytes],
        clients: int,
        pause_s: float = 0.0,
        rest_s: float = 0.0,
    ) -> None:
        self.asked: list[Asked] = []
        self._pause_s, self._rest_s = pause_s, rest_s
        self._entrance, self._path, self._bodies = entrance, f"/predictions/{model}", bodies
        self._context = entrance.context()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(clients)]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * TIMEOUT_S)

    def _ask(self, turn: int) -> None:
        connection = self._entrance.connect(self._context)
        headers = {"Authorization": f"Bearer {self._entrance.key}"}
        while not self._ended.is_set():
            at, begun = time.time(), time.perf_counter()
            status, told, later = 0, "", False
            try:
                connection.request("PUT", self._path, self._bodies[turn % len(self._bodies)], headers)
                answer = connection.getresponse()
                text = answer.read()
                status, later = answer.status, answer.headers["Retry-After"] is not None
                told = "" if status == 200 else text.decode("utf-8", "replace")[:200]
            except (OSError, http.client.HTTPException) as error:
                told = repr(error)
                connection.close()
            self.asked.append(Asked(at, time.perf_counter() - begun, status, told, later))
            self._ended.wait(self._rest_s if status == 200 else self._pause_s)
            turn += len(self._threads) + 1
        connection.close()

    @property
    def answered(self) -> list[Asked]:
        """Those with status 200."""
        return [each for each in self.asked if each.status == 200]

    @property
    def failed(self) -> list[Asked]:
        """All others."""
        return [each for each in self.asked if each.status != 200]

    def latency_s(self, percent: float) -> float:
        """Of the answered ones."""
        return percentile([each.took_s for each in self.answered], percent) if self.answered else float("inf")

    def summary(self) -> str:
        """How many of each status, and the slowest answer."""
        statuses = Counter(each.status or "lost" for each in self.asked)
        counted = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items(), key=str))
        slowest = max((each.took_s for each in self.answered), default=0.0)
        return f"{counted}; median {1000 * self.latency_s(50):.0f} ms, slowest {slowest:.1f} s"
