"""The client asks again where that can help, tells the server's own words, and answers many in order."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from marten.client import AsyncClient, Client, ClientError, Patience, Told
from marten.files import ROOT
from tests.servers import Serve, echo_server

__all__ = ["echo_server"]

QUICK = Patience(timeout_s=5, tries=3, first_pause_s=0.01)


class Front(BaseHTTPRequestHandler):
    """Answers the length of a body; `busy.N` bodies are refused N times with 503 first, `bad` ones with 422."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server: Any = self.server
        server.asked.append((self.path, self.headers.get("Authorization"), body))
        status, answer = 200, {"length": float(len(body))}
        if body.startswith(b"busy.") and sum(b == body for _, _, b in server.asked) <= int(body[5:]):
            status, answer = 503, {"code": 503, "message": "queue full"}
        elif body.startswith(b"bad"):
            status, answer = 422, {"code": 422, "message": "a damaged JPEG picture"}
        elif body.startswith(b"drop"):
            self.close_connection = True
            return
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def front() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Front)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_full_queue_is_asked_again_and_a_bad_picture_is_not(front: Any) -> None:
    with Client(front.url, key="secret", patience=QUICK) as client:
        assert client.predict("vgg", b"busy.2") == {"length": 6.0}
        with pytest.raises(ClientError, match="422: a damaged JPEG picture") as error:
            client.predict("vgg", b"bad one")
    assert error.value.status == 422
    assert [body for _, _, body in front.asked] == [b"busy.2"] * 3 + [b"bad one"]
    assert {(path, key) for path, key, _ in front.asked} == {("/predictions/vgg", "Bearer secret")}


def test_the_last_refusal_and_a_lost_connection_are_told(front: Any) -> None:
    with Client(front.url, patience=QUICK) as client:
        with pytest.raises(ClientError, match="503: queue full"):
            client.predict("vgg", b"busy.9")
        with pytest.raises(ClientError, match="no answer from"):
            client.predict("vgg", b"drop")
    assert len(front.asked) == 6


def some_pictures(folder: Path) -> list[Path]:
    paths = []
    for number in range(12):
        paths.append(folder / f"{number:02}.jpg")
        paths[-1].write_bytes(b"bad" if number == 5 else b"busy.1" if number == 3 else b"x" * (number + 1))
    return [*paths, folder / "missing.jpg"]


def check(told: list[Told], paths: list[Path]) -> None:
    assert [each.path for each in told] == paths
    assert [each.path.name for each in told if each.answer is None] == ["05.jpg", "missing.jpg"]
    assert told[7].answer == {"length": 8.0}
    assert "cannot read" in str(told[-1].error)


def test_many_are_answered_in_order_and_an_error_ends_none_but_its_own(front: Any, tmp_path: Path) -> None:
    paths = some_pictures(tmp_path)
    with Client(front.url, patience=QUICK) as client:
        check(list(client.predict_many("vgg", paths, at_once=3)), paths)


def test_the_same_without_waiting(front: Any, tmp_path: Path) -> None:
    paths = some_pictures(tmp_path)

    async def ask() -> list[Told]:
        async with AsyncClient(front.url, patience=QUICK) as client:
            assert await client.predict("vgg", b"busy.1") == {"length": 6.0}
            with pytest.raises(ClientError, match="no answer"):
                await client.predict("vgg", b"drop")
            return [told async for told in client.predict_many("vgg", paths, at_once=3)]

    check(asyncio.run(ask()), paths)


def test_the_command_answers_and_names_what_it_could_not(front: Any, tmp_path: Path) -> None:
    some_pictures(tmp_path)
    table = tmp_path / "answers.csv"
    words = [sys.executable, str(ROOT / "scripts" / "ask"), "vgg", str(tmp_path), "--url", front.url]
    done = subprocess.run([*words, "--csv", str(table)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "05.jpg: 422: a damaged JPEG picture" in done.stderr
    lines = table.read_text().splitlines()
    assert lines[0] == "path,label,value"
    assert len(lines) == 12


@pytest.mark.server
def test_a_real_server_answers(echo_server: Serve) -> None:
    with Client(f"http://{echo_server.address.host}:{echo_server.address.port}") as client:
        assert client.predict("echo", b"a picture")
        with pytest.raises(ClientError, match="404") as error:
            client.predict("nobody", b"a picture")
    assert error.value.status == 404
