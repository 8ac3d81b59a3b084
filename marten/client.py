"""Ask a served model, from Python: one picture or thousands, waiting or not, trying again where that can help.

    from marten.client import Client
    with Client("http://localhost:8080") as client:
        client.predict("vgg", "dog.jpg")                       # {"dog": 0.80...}
        for told in client.predict_many("vgg", paths): ...     # in order, each with its answer or its error

A prediction changes nothing on the server, so it is asked again after a lost connection or a 429, 502, 503, 504 or 507;
a 4xx is the picture's own fault and is told at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from marten.errors import MartenError

Picture = bytes | str | Path
_TRY_AGAIN = frozenset({429, 502, 503, 504, 507})


class ClientError(MartenError):
    """The server gave no answer, or a refusal.

    Attributes:
        status: of the refusal; None when no answer came at all.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Told:
    """What became of one of many pictures.

    Attributes:
        path: as it was given.
        answer: of the server, for instance {"dog": 0.98}; None where there is an error.
        error: why there is no answer; None where there is one.
    """

    path: Path
    answer: dict[str, Any] | None
    error: MartenError | None = None


@dataclass(frozen=True)
class Patience:
    """How long to wait and how often to ask.

    Attributes:
        timeout_s: longest wait for one answer.
        tries: how often a picture is asked about at most.
        first_pause_s: before the second try; it doubles each time, with chance in it so that clients part.
    """

    timeout_s: float = 30.0
    tries: int = 4
    first_pause_s: float = 0.2

    def pause_s(self, tried: int, answer: httpx.Response | None) -> float:
        """Seconds to wait after `tried` tries: what Retry-After asks for, or the doubling pause."""
        asked = answer.headers.get("Retry-After", "") if answer is not None else ""
        if asked.isdecimal():
            return min(float(asked), self.timeout_s)
        return float(min(self.first_pause_s * 2 ** (tried - 1) * random.uniform(0.5, 1.5), self.timeout_s))


class Client:
    """Asks a server and waits for its answers; safe to share between threads.

    Args:
        url: of the server, without /predictions.
        key: sent as `Authorization: Bearer`, where the server is behind a front door that wants one.
        patience: time-outs and tries.
    """

    def __init__(self, url: str = "http://localhost:8080", key: str = "", patience: Patience | None = None) -> None:
        self._patience = patience or Patience()
        self._http = httpx.Client(**_options(url, key, self._patience))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(self, model: str, picture: Picture) -> dict[str, Any]:
        """The answer for one picture, given as bytes or as a path.

        Raises:
            ClientError: a refusal, with the server's own words, or no answer within all tries.
        """
        data = _bytes_of(picture)
        for tried in range(1, self._patience.tries + 1):
            answer, lost = None, ""
            try:
                answer = self._http.put(f"/predictions/{model}", content=data)
            except httpx.TransportError as error:
                lost = _told(error)
            if _settled(answer, tried, self._patience):
                return _answer(answer, self._http.base_url, lost)
            time.sleep(self._patience.pause_s(tried, answer))
        raise AssertionError("unreachable: the last try settles")

    def predict_many(self, model: str, pictures: Iterable[str | Path], at_once: int = 8) -> Iterator[Told]:
        """Answers in the order of the pictures, `at_once` of them under way; an error ends none but its own.

        The iterable is read no further ahead than that, so it may be endless.
        """
        with ThreadPoolExecutor(at_once) as pool:
            under_way: deque[tuple[Path, Future[dict[str, Any]]]] = deque()
            try:
                for picture in pictures:
                    under_way.append((Path(picture), pool.submit(self.predict, model, Path(picture))))
                    if len(under_way) > at_once:
                        yield _result(*under_way.popleft())
                while under_way:
                    yield _result(*under_way.popleft())
            finally:
                for _, future in under_way:
                    future.cancel()


class AsyncClient:
    """The same for asyncio: `async with AsyncClient() as client: await client.predict("vgg", "dog.jpg")`."""

    def __init__(self, url: str = "http://localhost:8080", key: str = "", patience: Patience | None = None) -> None:
        self._patience = patience or Patience()
        self._http = httpx.AsyncClient(**_options(url, key, self._patience))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def predict(self, model: str, picture: Picture) -> dict[str, Any]:
        """As `Client.predict`."""
        data = await asyncio.to_thread(_bytes_of, picture)
        for tried in range(1, self._patience.tries + 1):
            answer, lost = None, ""
            try:
                answer = await self._http.put(f"/predictions/{model}", content=data)
            except httpx.TransportError as error:
                lost = _told(error)
            if _settled(answer, tried, self._patience):
                return _answer(answer, self._http.base_url, lost)
            await asyncio.sleep(self._patience.pause_s(tried, answer))
        raise AssertionError("unreachable: the last try settles")

    async def predict_many(self, model: str, pictures: Iterable[str | Path], at_once: int = 8) -> AsyncIterator[Told]:
        """As `Client.predict_many`."""
        under_way: deque[tuple[Path, asyncio.Task[dict[str, Any]]]] = deque()

        async def result(path: Path, task: asyncio.Task[dict[str, Any]]) -> Told:
            try:
                return Told(path, await task)
            except MartenError as error:
                return Told(path, None, error)

        try:
            for picture in pictures:
                under_way.append((Path(picture), asyncio.create_task(self.predict(model, Path(picture)))))
                if len(under_way) >= at_once:
                    yield await result(*under_way.popleft())
            while under_way:
                yield await result(*under_way.popleft())
        finally:
            for _, task in under_way:
                task.cancel()


def count_progress(told: Iterable[Told], progress: Callable[[int], None]) -> Iterator[Told]:
    """Pass answers on, calling `progress` with how many there have been."""
    for done, each in enumerate(told, 1):
        yield each
        progress(done)


def _options(url: str, key: str, patience: Patience) -> dict[str, Any]:
    headers = {"Content-Type": "application/octet-stream", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    # trust_env: a proxy meant for the internet must not stand between this machine and itself
    return {"base_url": url, "timeout": patience.timeout_s, "headers": headers, "trust_env": False}


def _bytes_of(picture: Picture) -> bytes:
    if isinstance(picture, bytes):
        return picture
    try:
        return Path(picture).read_bytes()
    except OSError as error:
        raise ClientError(f"cannot read {picture}: {error.strerror}") from error


def _settled(answer: httpx.Response | None, tried: int, patience: Patience) -> bool:
    return tried >= patience.tries or (answer is not None and answer.status_code not in _TRY_AGAIN)


def _answer(answer: httpx.Response | None, url: httpx.URL, lost: str) -> dict[str, Any]:
    if answer is None:
        raise ClientError(f"no answer from {url}: {lost}")
    try:
        body = answer.json()
    except ValueError:
        body = {}
    if not isinstance(body, dict):
        body = {}
    if answer.is_success and body:
        return body
    said = body.get("message") or answer.reason_phrase or "no words"
    raise ClientError(f"{answer.status_code}: {said}", answer.status_code)


def _told(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__


def _result(path: Path, future: Future[dict[str, Any]]) -> Told:
    try:
        return Told(path, future.result())
    except MartenError as error:
        return Told(path, None, error)
