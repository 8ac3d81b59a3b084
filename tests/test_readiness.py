"""Asking models, against a small server that answers, refuses or hangs as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from marten.errors import ServerError
from marten.readiness import Address, ask_model, check_models, golden_picture, is_loaded, served_models
from modelspec import read_picture
from tests.servers import free_ports


class Pretender(BaseHTTPRequestHandler):
    """Stands for both the inference and the management address of TorchServe."""

    workers: list[dict[str, Any]] = []  # noqa: RUF012

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/hangs"):
            time.sleep(1.5)
        ill = self.path.endswith("/ill")
        self.answer(503 if ill else 200, {"code": 503, "message": "no worker\nat all"} if ill else {"cat": 0.9})

    def do_GET(self) -> None:
        listed = {"models": [{"modelName": "vgg"}, {"modelName": "cnn"}]}
        self.answer(200, listed if self.path.startswith("/models?") else [{"workers": self.workers}])

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def address() -> Iterator[Address]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pretender) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Address("127.0.0.1", server.server_address[1])
        server.shutdown()
        thread.join()


def test_the_golden_picture_is_one_that_every_model_reads() -> None:
    assert golden_picture() == golden_picture.__wrapped__()
    assert read_picture(golden_picture()).size == (128, 96)


def test_each_model_says_whether_it_is_ready(address: Address) -> None:
    well, ill, hangs = check_models(address, address, ["well", "ill", "hangs"], timeout_s=0.5)
    assert (well.ready, well.reason) == (True, "")
    assert 0 < well.latency_s < 0.5
    assert (ill.ready, ill.reason) == (False, "status 503: no worker")
    assert not hangs.ready
    assert hangs.reason.startswith("no answer within")


def test_proxies_of_the_environment_are_passed_by(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert ask_model(address, "well").ready


def test_a_server_that_is_not_there_is_not_ready() -> None:
    (port,) = free_ports(1)
    nowhere = Address("127.0.0.1", port)
    (status,) = check_models(nowhere, nowhere, ["vgg"])
    assert "cannot be asked" in status.reason
    assert not is_loaded(nowhere, "vgg")
    with pytest.raises(ServerError, match="no TorchServe answers at"):
        served_models(nowhere)


def test_loaded_means_every_worker(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served_models(address) == ["cnn", "vgg"]
    for states, loaded in (([], False), (["READY"], True), (["READY", "UNLOADING"], False)):
        monkeypatch.setattr(Pretender, "workers", [{"status": state, "pid": -1} for state in states])
        assert is_loaded(address, "vgg") is loaded
