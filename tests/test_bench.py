"""The bench counts what clients see, builds what it compares, and judges figures both ways."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from marten.architectures import the_one_class
from marten.bench import contestants
from marten.bench.contestants import EXACT, FAST, FITTED, STOCK, make_weights, pack
from marten.bench.load import draw_photograph, percentile, photographs, put_load
from marten.bench.report import Row, ratios, rows, table, write_report
from marten.errors import DataError
from marten.readiness import Address
from modelspec import load_state_dict
from tests.conftest import ROOT


class Slow(BaseHTTPRequestHandler):
    """Answers each picture after 20 ms, every fifth with status 503."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.02)
        self.asked.append(self.path)
        self.send_response(503 if len(self.asked) % 5 == 0 else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def slow() -> Iterator[Address]:
    Slow.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Address("127.0.0.1", server.server_address[1])
        server.shutdown()
        thread.join()


def test_a_load_is_counted_timed_and_spread_over_models(slow: Address) -> None:
    load = put_load(slow, ["a", "b"], [b"1", b"2", b"3"], clients=4, seconds=0.5)
    asked = len(Slow.asked)
    assert load.failed == asked // 5
    assert 0 < load.requests_s <= (asked - load.failed) / 0.5
    assert 20 <= load.p50_ms <= load.p99_ms
    assert {path: Slow.asked.count(path) > asked // 4 for path in Slow.asked} == {
        "/predictions/a": True,
        "/predictions/b": True,
    }


def test_a_server_that_is_not_there_fails_and_does_not_hang() -> None:
    load = put_load(Address("127.0.0.1", 9), ["a"], [b"1"], clients=2, seconds=0.05)
    assert (load.requests_s, load.failed > 1) == (0.0, True)


@pytest.mark.parametrize(("percent", "value"), [(50, 50), (99, 99), (100, 100), (1, 1)])
def test_percentiles(percent: int, value: int) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == value


def test_photographs_are_of_photographs_size_and_the_same_at_every_call(tmp_path: Path) -> None:
    drawn = photographs(None, 3)
    assert drawn == photographs(None, 3)
    assert len(set(drawn)) == 3
    assert all(15_000 < len(data) < 80_000 for data in drawn)
    assert Image.open(io.BytesIO(draw_photograph(0, (800, 600)))).size == (800, 600)
    with pytest.raises(DataError, match=r"no \.jpg"):
        photographs(tmp_path)


def test_the_contestants_serve_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = make_weights("cat_dog_conv_net", tmp_path)
    held = {}
    for kind in (STOCK, FITTED, EXACT, FAST):
        (mar,) = pack(kind, weights, tmp_path).glob("*.mar")
        with zipfile.ZipFile(mar) as archive:
            held[kind] = {name: archive.read(name) for name in archive.namelist()}
    assert {held[kind][weights.name] for kind in held} == {weights.read_bytes()}
    assert b"precision: auto" in held[FAST]["model-config-fast.yaml"]
    assert b"precision: fp32" in held[EXACT]["model-config.yaml"]
    assert json.loads(held[STOCK]["MAR-INF/MANIFEST.json"])["model"]["handler"] == "image_classifier"
    assert "modelspec.py" not in held[STOCK]
    (tmp_path / "stock_net.py").write_bytes(held[STOCK]["cat_dog_conv_net.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    network = the_one_class(importlib.import_module("stock_net"))()  # as TorchServe's own handlers build it
    network.load_state_dict(load_state_dict(weights))
    assert network.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 5)


def test_stock_keeps_the_threads_that_torchserve_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(contestants, "available_cores", lambda: 6)
    monkeypatch.setattr(contestants.server, "start", lambda settings: (started.append(settings), [], False))
    weights = make_weights("cat_dog_conv_net", tmp_path)
    for kind in (STOCK, FITTED):
        contestants.launch(kind, pack(kind, weights, tmp_path), 4)
    assert [settings.threads == 6 for settings in started] == [True, False]
    assert [len(settings.models) for settings in started] == [4, 4]
    assert [settings.workers for settings in started] == [1, None]


def record(contestant: str, rate: float, clients: int = 8, what: str = "", **more: Any) -> dict[str, Any]:
    base = {"network": "resnet18", "contestant": contestant, "clients": clients, "what": what, "round": 0}
    return {**base, "requests_s": rate, "p50_ms": 100.0, "p99_ms": 120.0, "failed": 0, **more}


@pytest.mark.parametrize(("rate", "reached"), [(80.0, True), (37.0, False)])
def test_figures_are_judged_by_the_median_of_ratios_within_a_turn(tmp_path: Path, rate: float, reached: bool) -> None:
    turns = [(rate, 10.0), (rate * 2, 20.0), (1.0, 10.0)]  # one turn was disturbed
    records = [record(FAST, ours) for ours, _ in turns] + [record(STOCK, stock) for _, stock in turns]
    found = {"records": records, "starts": [], "memory": [], "answers": [{"network": "resnet18", "largest": 1e-4}]}
    assert ratios(records[:3], records[3:]) == [rate / 10, rate / 10, 0.1]
    by_text = {row.text: row for row in rows(found)}
    row = by_text["resnet18, 8 clients: req/s × stock"]
    assert (row.found, row.wanted, row.reached) == (rate / 10, 3.8, reached)
    assert by_text["resnet18, 8 clients: p99 ÷ p50"].reached
    assert by_text["resnet18: answers off fp32"].reached
    assert f"| resnet18 | 8 | ours fast | {rate:.1f} | {rate / 10:.2f} (0.10–{rate / 10:.2f}) |" in "\n".join(
        table(found)
    )
    write_report(found, tmp_path, lambda line: None)
    assert json.loads((tmp_path / "serving.json").read_text()) == found
    assert Image.open(io.BytesIO((tmp_path / "serving.png").read_bytes())).width > 300


def test_what_is_registered_together_is_compared_with_one_alone() -> None:
    records = [record(FAST, 60.0, what="1 models"), record(FAST, 90.0, what="4 models")]
    memory = [{"contestant": kind, "models": 4, "memory_mb": used} for kind, used in ((STOCK, 1000.0), (FAST, 1100.0))]
    starts = [{"network": "n", "contestant": kind, "start_s": s} for kind, s in ((STOCK, 4.0), (FAST, 5.0))]
    told = {row.text: row for row in rows({"records": records, "starts": starts, "memory": memory, "answers": []})}
    assert told["resnet18, 4 models: req/s × one model"].found == 1.5
    assert not told["resnet18, 4 models: req/s × one model"].reached
    assert not told["4 models: memory × stock"].reached
    assert told["n: start × stock"].reached


def test_a_row_tells_what_was_wanted() -> None:
    assert str(Row("a ÷ b", 0.5, 0.95, True)) == "MISSED   a ÷ b: 0.5 (wanted ≥ 0.95)"
    assert str(Row("a ÷ b", 0.5, 0.95, False)) == "reached  a ÷ b: 0.5 (wanted ≤ 0.95)"


def bench(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench"), "serve", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize("words", [("--rounds", "0"), ("--conv_net", "no_such_net")])
def test_misuse_is_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    told = bench(*words, cwd=tmp_path)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr


@pytest.mark.server
@pytest.mark.slow
def test_a_small_network_is_measured_from_end_to_end(tmp_path: Path) -> None:
    words = ("--conv_net", "cat_dog_conv_net", "--rounds", "1", "--seconds", "0.5", "--clients", "1", "4")
    told = bench(*words, "--copies", "1", "--small", "--out", str(tmp_path), cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    found = json.loads((tmp_path / "serving.json").read_text())
    assert {r["contestant"] for r in found["records"]} == {STOCK, FITTED, EXACT, FAST, "in process"}
    assert all(r["requests_s"] > 0 and not r["failed"] for r in found["records"])
    assert found["answers"][0]["largest"] <= 2e-3
