"""The page's server hands out the page and nothing else, passes pictures on, and ends with its TorchServe."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from marten.readiness import Address, free_ports
from marten.web import KINDS, MAX_BYTES, PAGE, PageServer
from tests.servers import Serve, allowed_s, serve, wait_until

__all__ = ["serve"]


class Inference(ThreadingHTTPServer):
    """In TorchServe's place: `answers` by path, each (status, headers, body) in turn, the last one for ever."""

    daemon_threads = True

    def __init__(self, answers: dict[str, list[tuple[int, dict[str, str], bytes]]]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        super().__init__(("127.0.0.1", 0), _Answer)


class _Answer(BaseHTTPRequestHandler):
    server: Inference
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, dict(self.headers), body))
        left = self.server.answers.get(self.path, [(404, {}, b'{"code": 404, "message": "no such model"}')])
        status, headers, answer = left.pop(0) if len(left) > 1 else left[0]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(answer))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def listening(server: ThreadingHTTPServer) -> Iterator[int]:
    """The port of a server that answers in a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def inference() -> Iterator[Inference]:
    told = {"Content-Type": "application/json", "Server-Timing": "decode;dur=2.5, forward;dur=20"}
    server = Inference({"/predictions/pets": [(200, told, b'{"cat": 0.75}')]})
    with listening(server):
        yield server


@pytest.fixture
def port(inference: Inference) -> Iterator[int]:
    with listening(PageServer(0, Address("127.0.0.1", inference.server_port), ("pets", "more"))) as port:
        yield port


def exchange(
    port: int, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def test_every_file_of_the_page_is_handed_out(port: int) -> None:
    for file in sorted(PAGE.iterdir()):
        if file.suffix in KINDS:
            status, headers, body = exchange(port, "GET", f"/{file.name}")
            assert (status, headers["Content-Type"], body) == (200, KINDS[file.suffix], file.read_bytes())
    assert exchange(port, "GET", "/?model=pets")[2] == (PAGE / "index.html").read_bytes()


def test_the_models_are_those_that_run(port: int) -> None:
    assert json.loads(exchange(port, "GET", "/models.json")[2]) == {"models": ["pets", "more"]}


@pytest.mark.parametrize(
    "path", ["/../config.properties", "/%2e%2e/config.properties", "//etc/passwd", "/README", "/x.js"]
)
def test_nothing_else_is_handed_out(port: int, path: str) -> None:
    assert exchange(port, "GET", path)[0] == 404


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_a_picture_is_passed_on_and_its_answer_back(port: int, inference: Inference, method: str) -> None:
    picture = bytes(range(256)) * 40
    status, headers, body = exchange(port, method, "/predictions/pets", picture, X_Request_Id="mine", Cookie="secret")
    assert (status, body, headers["Server-Timing"]) == (200, b'{"cat": 0.75}', "decode;dur=2.5, forward;dur=20")
    ((path, sent, arrived),) = inference.asked
    assert (path, arrived, sent["X-Request-Id"]) == ("/predictions/pets", picture, "mine")
    assert "Cookie" not in sent


def test_refusals_come_through(port: int) -> None:
    status, _, body = exchange(port, "PUT", "/predictions/none", b"x")
    assert (status, json.loads(body)["message"]) == (404, "no such model")


@pytest.mark.parametrize("path", ["/models/pets", "/predictions/", "/predictions/a/../../models", "/metrics"])
def test_no_other_interface_is_reached(port: int, inference: Inference, path: str) -> None:
    assert exchange(port, "PUT", path, b"x")[0] == 404
    assert inference.asked == []


def test_a_body_too_large_is_refused_before_it_is_sent(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest("PUT", "/predictions/pets")
    connection.putheader("Content-Length", str(MAX_BYTES + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_names_of_other_machines_are_not_answered(port: int, inference: Inference) -> None:
    """A page elsewhere may make its own name mean 127.0.0.1, and would then be of our origin."""
    for method, path in (("GET", "/"), ("GET", "/models.json"), ("PUT", "/predictions/pets")):
        assert exchange(port, method, path, b"x" if method == "PUT" else None, Host="evil.example:80")[0] == 403
    assert exchange(port, "GET", "/", Host=f"localhost:{port}")[0] == 200
    assert inference.asked == []


def test_a_server_that_is_gone_is_told() -> None:
    with listening(PageServer(0, Address("127.0.0.1", free_ports(1)[0]), ("pets",))) as port:
        status, _, body = exchange(port, "PUT", "/predictions/pets", b"x")
    assert (status, json.loads(body)["message"]) == (502, "TorchServe does not answer")


@pytest.mark.server
def test_the_page_comes_with_the_server_and_goes_with_it(serve: Serve) -> None:
    (port,) = free_ports(1)
    for _ in range(2):  # the second time, both are there already
        started = serve.run("start", "--web", "--web_port", str(port))
        assert f"page: http://127.0.0.1:{port}/" in started.stdout, started.stderr
        assert json.loads(exchange(port, "GET", "/models.json")[2]) == {"models": ["echo"]}
    assert json.loads(exchange(port, "PUT", "/predictions/echo", b"12345")[2])["bytes"] == 5
    assert serve.run("stop", "--drain_s", "0").returncode == 0

    def is_gone() -> bool:
        try:
            return bool(exchange(port, "GET", "/")[0] == 0)
        except OSError:
            return True

    wait_until(is_gone, allowed_s(3))
