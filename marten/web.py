"""The page to try a model, on this machine alone: `deployment/web`, and /predictions and /explanations behind it.

    python -m marten.web 8083 8080          the page on port 8083, for the TorchServe that scripts/serve runs on 8080

Page and answers come from one origin, so TorchServe need not allow others. It listens on loopback, answers only what is
addressed to this machine by name (a page elsewhere cannot reach it by rebinding its own name), and ends when its
TorchServe has. To the network, the front door serves the same folder: docs/frontdoor.md.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from marten.errors import ServerError
from marten.files import ROOT
from marten.readiness import Address, request
from marten.runtime import Running, find_process, find_running

PAGE = ROOT / "deployment" / "web"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Content types by suffix; no other file of the folder is handed out."""

MAX_BYTES = 16 * 1024 * 1024
"""Largest body passed on: `max_request_size` of deployment/config.properties."""

ANSWER_TIMEOUT_S = 30.0
_ASKED = re.compile(r"/(predictions|explanations)/[\w.%-]+")
_TICK_S = 0.2
_START_TIMEOUT_S = 10.0
_PASSED_ON = ("Accept", "Content-Type", "X-Request-Id")
_PASSED_BACK = ("Content-Type", "Retry-After", "Server-Timing", "X-Request-Id")
_NAMES_OF_THIS_MACHINE = ("127.0.0.1", "localhost")


class PageServer(ThreadingHTTPServer):
    """Gives the page and passes pictures on.

    Args:
        port: to listen on, of 127.0.0.1.
        inference: TorchServe's, which answers.
        models: names that the page offers.
    """

    daemon_threads = True

    def __init__(self, port: int, inference: Address, models: tuple[str, ...]) -> None:
        self.inference = inference
        self.models = models
        super().__init__(("127.0.0.1", port), _Exchange)


class _Exchange(BaseHTTPRequestHandler):
    """One connection: a file of the page, the list of models, or a picture on its way."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # s without a byte, after which a connection is closed

    def do_GET(self) -> None:
        """Answer with a file of the page, or with the models' names."""
        path = self.path.partition("?")[0]
        if not self._is_meant_for_us():
            return
        if path == "/models.json":
            self._send(200, {"Content-Type": "application/json"}, json.dumps({"models": self.server.models}).encode())
            return
        name = "index.html" if path == "/" else path[1:]
        if "/" in name or Path(name).suffix not in KINDS or not (PAGE / name).is_file():
            self._refuse(404, "there is nothing here: the page is at /")
            return
        self._send(200, {"Content-Type": KINDS[Path(name).suffix]}, (PAGE / name).read_bytes())

    def do_PUT(self) -> None:
        """Pass a picture on to TorchServe, and its answer back."""
        length = self.headers.get("Content-Length", "")
        if not self._is_meant_for_us():
            return
        if not length.isdecimal() or int(length) > MAX_BYTES:
            self.close_connection = True  # the body is left unread
            self._refuse(413 if length.isdecimal() else 411, f"send a body of known length, at most {MAX_BYTES} bytes")
            return
        body = self.rfile.read(int(length))
        if not _ASKED.fullmatch(self.path):
            self._refuse(404, "ask /predictions/MODEL or /explanations/MODEL")
            return
        headers = {name: self.headers[name] for name in _PASSED_ON if name in self.headers}
        try:
            status, told, answer = self._ask(body, headers)
        except (OSError, http.client.HTTPException) as error:
            self._refuse(504 if isinstance(error, TimeoutError) else 502, "TorchServe does not answer")
            return
        self._send(status, {name: told[name] for name in _PASSED_BACK if name in told}, answer)

    def do_POST(self) -> None:
        """Pass a picture on, however it was sent."""
        self.do_PUT()

    def _ask(self, body: bytes, headers: dict[str, str]) -> tuple[int, http.client.HTTPMessage, bytes]:
        inference = self.server.inference
        connection = http.client.HTTPConnection(inference.host, inference.port, timeout=ANSWER_TIMEOUT_S)
        try:
            connection.request("PUT", self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def _is_meant_for_us(self) -> bool:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host in _NAMES_OF_THIS_MACHINE:
            return True
        self.close_connection = True
        self._refuse(403, f"this page is for this machine: ask {' or '.join(_NAMES_OF_THIS_MACHINE)}")
        return False

    def _refuse(self, code: int, message: str) -> None:
        kind = http.client.responses[code].replace(" ", "")
        self._send(
            code,
            {"Content-Type": "application/json"},
            json.dumps({"code": code, "type": kind, "message": message}).encode(),
        )

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: TorchServe's access log has a line for each picture."""


def start_page(running: Running, port: int) -> str:
    """Start the page beside a server, in a process that ends when the server does; returns the page's address.

    Raises:
        ServerError: something else listens on the port, or the page does not come.
    """
    url = f"http://127.0.0.1:{port}/"
    if _models_of(port) == list(running.models):
        return url
    words = [sys.executable, "-m", "marten.web", str(port), str(running.addresses["inference"].port)]
    with open(running.logs / "web.log", "ab") as log:
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(_TICK_S / 2)
        if _models_of(port) == list(running.models):
            return url
    process.kill()
    last = (running.logs / "web.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
    raise ServerError(
        f"no page on port {port}: {' '.join(last) or 'it does not answer'}; choose another with --web_port"
    )


def _models_of(port: int) -> list[str] | None:
    """What a page on that port offers, or None where there is none."""
    try:
        status, body = request(Address("127.0.0.1", port), "GET", "/models.json", timeout_s=1.0)
        models = json.loads(body)["models"] if status == 200 else None
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
    return list(models) if isinstance(models, list) else None


def main(port: int, inference_port: int) -> None:
    """Serve the page as long as the TorchServe lives that scripts/serve started on that inference port.

    Raises:
        ServerError: there is none.
        OSError: the port is taken.
    """
    running = find_running(inference_port)
    if running is None:
        raise ServerError(f"nothing that scripts/serve started runs on port {inference_port}")
    with PageServer(port, running.addresses["inference"], running.models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while find_process(running.pid) is not None:
            time.sleep(_TICK_S)
        server.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
