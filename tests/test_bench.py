"""The bench counts what clients see, builds what it compares, and judges figures both ways."""

from __future__ import annotations

import base64
import email
import importlib
import io
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from marten.architectures import the_one_class
from marten.bench import contestants
from marten.bench.contestants import EXACT, FAST, FITTED, STOCK, make_weights, pack
from marten.bench.load import Asking, Caller, draw_photograph, family_cpu_s, percentile, photographs, put_load
from marten.bench.peers.launching import OURS, PEERS, QUICKSTART, Peer, launch_peer
from marten.bench.report import Row, ratios, rows, table, write_report
from marten.bench.training import (
    LOADER,
    NETWORK,
    TRAINING,
    TrainingPlan,
    bench_training,
    training_figures,
    training_table,
    write_training,
)
from marten.errors import DataError, ServerError
from marten.readiness import Address
from marten.weights import load_model
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


def test_a_servers_processor_time_is_that_of_its_whole_family(slow: Address) -> None:
    busy = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint(1, flush=True)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy + '; input()'!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert family_cpu_s(process.pid) > 0.25  # the system counts in hundredths
        load = put_load(slow, ["a"], [b"1"], 1, 0.1, pid=process.pid)
        process.communicate(b"\n")
    assert 0 <= load.cpu_ms < 100  # it does nothing any more
    assert put_load(slow, ["a"], [b"1"], 1, 0.1).cpu_ms == 0


def test_a_server_that_is_not_there_fails_and_does_not_hang() -> None:
    load = put_load(Address("127.0.0.1", 9), ["a"], [b"1"], clients=2, seconds=0.05)
    assert (load.requests_s, load.failed > 1) == (0.0, True)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n12345", "200"),
        (b"HTTP/1.1 422 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", "422"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n0\r\n12\r\n0\r\n\r\n", "200"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n12345", "ConnectionError"),
        (b"HTTP/1.1 200 OK\r\n", "ConnectionError"),
        (b"HTTP/1.1 200 OK\r\nServer: s\r\n\r\n12345", "ValueError"),
    ],
)
def test_a_caller_reads_an_answer_to_its_end_however_it_comes(answer: bytes, told: str) -> None:
    turns = range(2 if b"close" in answer else 1)  # where it says so, the next request makes a new connection

    def reply(server: socket.socket) -> None:
        for _ in turns:
            with server.accept()[0] as connection:
                assert connection.recv(1000).endswith(b"\r\nContent-Length: 7\r\n\r\npicture")
                for i in range(len(answer)):
                    connection.sendall(answer[i : i + 1])

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        replying = pool.submit(reply, server)
        caller = Caller(Address("127.0.0.1", server.getsockname()[1]))
        for _ in turns:
            try:
                status = caller.ask("PUT", "/predictions/m", b"picture", {"Content-Type": "image/jpeg"})
            except (OSError, ValueError) as error:
                status = type(error).__name__
            assert status == told
        caller.close()
        replying.result(timeout=10)


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
    return {**base, "requests_s": rate, "p50_ms": 100.0, "p99_ms": 120.0, "failed": 0, "cpu_ms": 7.5, **more}


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
    assert (
        f"| resnet18 | 8 | ours fast | {rate:.1f} | {rate / 10:.2f} (0.10–{rate / 10:.2f}) | 100 | 120 | 7.5 |"
        in "\n".join(table(found))
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


def test_a_picture_is_wrapped_as_the_server_asks_for_it(slow: Address) -> None:
    picture = draw_photograph(0, (40, 30))
    body, headers = Asking("POST", "/predict", "json").wrapped(picture)
    assert base64.b64decode(json.loads(body)["image"]) == picture
    assert headers == {"Content-Type": "application/json"}
    body, headers = Asking("POST", "/predict", "form").wrapped(picture)
    sent = email.message_from_bytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body)
    (part,) = sent.get_payload()
    assert (part.get_param("name", header="Content-Disposition"), part.get_filename()) == ("file", "a.jpg")
    assert part.get_payload(decode=True) == picture
    assert Asking().wrapped(picture) == (picture, {})
    load = put_load(slow, ["a"], [picture], 1, 0.1, Asking("PUT", "/elsewhere/{name}"))
    assert load.requests_s > 0
    assert set(Slow.asked) == {"/elsewhere/a"}


def beside(name: str, contestant: str, rates: list[float]) -> list[dict[str, Any]]:
    return [record(contestant, rate, what=f"beside {name}", round=turn) for turn, rate in enumerate(rates)]


def test_peers_are_told_beside_the_stock_of_their_own_turns(tmp_path: Path) -> None:
    records = [record(FAST, 50.0), record(STOCK, 10.0)]
    for name, stock in (("LitServe", [10.0, 20.0]), ("BentoML", [1.0, 2.0])):
        records += beside(name, STOCK, stock) + beside(name, FAST, [40.0, 80.0])
        records += beside(name, f"{name}, quickstart", [9.0, 18.0]) + beside(name, f"{name}, our engine", [30.0, 50.0])
    found = {"records": records, "starts": [], "memory": [], "answers": []}
    told = "\n".join(table(found))
    assert "| resnet18 | 8, beside LitServe | LitServe, quickstart | 13.5 | 0.90 (0.90–0.90) |" in told
    assert "| resnet18 | 8, beside BentoML | BentoML, quickstart | 13.5 | 9.00 (9.00–9.00) |" in told
    assert [row.text for row in rows(found)] == ["resnet18, 8 clients: req/s × stock", "resnet18, 8 clients: p99 ÷ p50"]
    write_report(found, tmp_path, lambda line: None)
    assert Image.open(io.BytesIO((tmp_path / "peers.png").read_bytes())).width > 300


def test_a_peer_that_ends_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    class Broken(Peer):
        def command(self, port: int) -> list[str]:
            return [sys.executable, "-c", "raise SystemExit('no such network')"]

    with pytest.raises(ServerError, match=r"Broken does not serve .*\n.*no such network"):
        launch_peer(Broken("Broken", "json", "", Asking()), QUICKSTART, tmp_path / "w", tmp_path / "run", 1, 1, b"")
    assert not Peer("Nobody's", "no_such_package", "", Asking()).installed


def test_the_command_knows_every_peer() -> None:
    told = subprocess.run(
        [sys.executable, ROOT / "scripts/bench", "serve", "--help"], capture_output=True, text=True, check=True
    )
    assert f"(default: {' '.join(peer.package for peer in PEERS)})" in " ".join(told.stdout.split())


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("way", [QUICKSTART, OURS])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_answers_as_the_network_itself(peer: Peer, way: str, tmp_path: Path) -> None:
    if not peer.installed:
        pytest.skip(f"{peer.name} is not installed (requirements-bench.txt)")
    weights = make_weights("cat_dog_conv_net", tmp_path)
    network, card = load_model(weights)
    picture = draw_photograph(1)
    folder = Path(tempfile.mkdtemp(prefix="mp-"))  # Ray's sockets refuse long paths
    running = launch_peer(peer, way, weights, folder / "run", 1, 1, picture)
    try:
        body, headers = peer.asking.wrapped(picture)
        connection = HTTPConnection(running.address.host, running.address.port, timeout=60)
        connection.request(peer.asking.method, peer.asking.path, body, headers)
        answer = json.loads(connection.getresponse().read())
        connection.close()
    finally:
        running.stop()
        shutil.rmtree(folder)
    assert running.process.poll() is not None
    with torch.inference_mode():
        (expected,) = card.spec.answers(card.spec.logits(network, card.spec.preprocess(picture)))
    # torchvision's transform sees another part of the picture; the weights' small outputs keep the answers near
    assert answer == pytest.approx(expected, abs=2e-3 if way == OURS else 2e-2)
    assert sum(answer.values()) == pytest.approx(1, abs=1e-4)


def test_training_is_told_in_shares_of_what_loader_and_network_allow() -> None:
    def turn(what: str, turn: int, images_s: float, device: str) -> dict[str, Any]:
        return {"network": "n", "what": what, "round": turn, "images_s": images_s, "waited": 0.25, "device": device}

    turns = [(40.0, 120.0, 27.0), (400.0, 1200.0, 270.0), (40.0, 120.0, 3.0)]  # the last one was disturbed
    for device, bound, network in (("cpu", 30.0, 120.0), ("cuda", 40.0, 120.0)):
        records = [
            turn(what, number, rate, device)
            for number, rates in enumerate(turns)
            for what, rate in zip((LOADER, NETWORK, TRAINING), rates, strict=True)
        ]
        (one,) = training_figures(records)
        assert (one.loader, one.network, one.training, one.waited) == (40.0, 120.0, 27.0, 0.25)
        assert one.of_bound == pytest.approx(27.0 / bound)
        assert one.of_network == pytest.approx(27.0 / network)
        assert f"| n | 40.0 | 120.0 | 27.0 | {27 / bound:.2f} | 0.23 | 25% |" in training_table([one])


def test_training_is_measured_as_train_main_trains(tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw_photograph(number, (60, 40)))
    plan = TrainingPlan(("cat_dog_conv_net",), rounds=1, seconds=0.1, batch_size=2, folder=tmp_path / "pictures")
    records = bench_training(plan, lambda line: None)
    assert [r["what"] for r in records] == [LOADER, NETWORK, TRAINING]
    assert all(r["images_s"] > 0 for r in records)
    assert records[1]["waited"] == 0  # the network alone waits for nobody
    assert 0 < records[2]["waited"] < 1
    paths = write_training(records, {"cores": 2}, tmp_path)
    assert json.loads(paths[0].read_text())["records"] == records
    assert Image.open(io.BytesIO(paths[1].read_bytes())).width > 200


def bench(*words: str, cwd: Path, verb: str = "serve") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench"), verb, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize("words", [("--rounds", "0"), ("--conv_net", "no_such_net")])
def test_misuse_is_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    told = bench(*words, cwd=tmp_path)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr


@pytest.mark.server
@pytest.mark.slow
def test_a_small_network_is_measured_from_end_to_end(tmp_path: Path) -> None:
    words = ("--peers", "--conv_net", "cat_dog_conv_net", "--rounds", "1", "--seconds", "0.5", "--clients", "1", "4")
    told = bench(*words, "--copies", "1", "--small", "--out", str(tmp_path), cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    found = json.loads((tmp_path / "serving.json").read_text())
    assert {r["contestant"] for r in found["records"]} == {STOCK, FITTED, EXACT, FAST, "in process"}
    assert all(r["requests_s"] > 0 and not r["failed"] for r in found["records"])
    assert found["answers"][0]["largest"] <= 2e-3


@pytest.mark.server
@pytest.mark.slow
def test_settings_of_one_model_are_compared(tmp_path: Path) -> None:
    weights = make_weights("cat_dog_conv_net", tmp_path)
    configs = [tmp_path / "hasty.yaml", tmp_path / "patient.yaml"]
    for config, delay_ms in zip(configs, (1, 400), strict=True):
        text = contestants.FAST_CONFIG.read_text()
        config.write_text(text.replace("maxBatchDelay: 1", f"maxBatchDelay: {delay_ms}"))
    words = ["--model_path", str(weights), "--model_config", *map(str, configs), "--clients", "1", "--rounds", "1"]
    told = bench(*words, "--seconds", "1.5", "--out", str(tmp_path), cwd=tmp_path, verb="configs")
    assert told.returncode == 0, told.stderr
    hasty, patient = json.loads((tmp_path / "configs.json").read_text())["records"]
    assert (hasty["contestant"], patient["contestant"]) == (str(configs[0]), str(configs[1]))
    assert hasty["p50_ms"] < 300 < 400 <= patient["p50_ms"]  # a lone client waits for company that never comes
    assert "| × the first (least–most) |" in told.stdout
    assert bench(*words[:3], *words[3:5], *words[3:4], cwd=tmp_path, verb="configs").returncode == 2


@pytest.mark.parametrize(("words", "traced"), [("--debug serve", True), ("serve --debug", True), ("serve", False)])
def test_debug_counts_before_the_verb_as_behind_it(words: str, traced: bool) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench"), *words.split(), "--conv_net", "nonsense"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert told.returncode == 2
    assert ("Traceback" in told.stderr) is traced
