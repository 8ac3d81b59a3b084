"""The front door lets in what it should, refuses the rest in the words of the contract, and loses no request.

Envoy is real, with the shipped settings. Behind it stand small replicas that fail on demand; one test has TorchServes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from marten import envoy, fleet
from marten.bench.crowd import Crowd, Entrance
from marten.bench.endurance import allowed_mb_h, slope_mb_h
from marten.bench.outside import Machine, machine
from marten.credentials import keys_text, open_or_make
from marten.doorkeeper import for_models
from marten.errors import ServerError, UsageError
from marten.frontdoor import PAGE, PROXY, Door, parse_address, set_replicas, write_config
from marten.readiness import Address, free_ports, golden_picture
from marten.runtime import find_process
from marten.serverconfig import CONFIG
from tests.servers import ROOT, allowed_s, build_archive, wait_until

# ------------------------------------------------------------------------------------------------ without Envoy


def test_what_a_network_door_needs_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    made, files = open_or_make(tmp_path / "s", ["door.example", "192.0.2.7"])
    assert {file.name for file in files} == {"tls.crt", "tls.key", "key", "keys.yaml"}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    told = ssl._ssl._test_decode_cert(str(made.certificate))  # type: ignore[attr-defined]
    names = {value for _, value in told["subjectAltName"]}
    assert {"door.example", "192.0.2.7", "localhost", "127.0.0.1"} <= names
    assert len(made.key) >= 40
    assert f"Bearer {made.key}" in made.keys.read_text()
    before = {file: file.read_bytes() for file in files}
    assert open_or_make(tmp_path / "s") == (made, [])
    assert {file: file.read_bytes() for file in files} == before


def test_keys_that_somebody_else_wrote_need_no_key_of_ours(tmp_path: Path) -> None:
    """As in Kubernetes, where the folder is a secret that cannot be written."""
    for name in ("tls.crt", "tls.key", "keys.yaml"):
        (tmp_path / name).write_text("theirs")
    assert open_or_make(tmp_path)[1] == []
    assert not (tmp_path / "key").exists()


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tls.crt").write_text("a certificate")
    with pytest.raises(ServerError, match=r"tls\.crt stands alone"):
        open_or_make(tmp_path)


def test_a_door_in_a_container_asks_the_models_that_it_is_told(tmp_path: Path) -> None:
    shipped, folder = tmp_path / "etc", tmp_path / "told"
    shutil.copytree(PROXY, shipped)
    folder.mkdir()
    text = (shipped / "envoy.yaml").read_text().replace("/etc/envoy", str(shipped))
    (shipped / "envoy.yaml").write_text(text)
    config = for_models(shipped / "envoy.yaml", "vgg, base_cnn", folder)
    clusters = yaml.safe_load((folder / "replicas.yaml").read_text())["resources"]
    assert clusters[0]["health_checks"][0]["http_health_check"]["path"] == "/predictions/vgg"
    assert json.loads((folder / "models.json").read_text()) == {"models": ["vgg", "base_cnn"]}
    assert str(folder / "replicas.yaml") in config.read_text()
    assert str(folder / "models.json") in config.read_text()
    assert "/srv/web/models.json" not in config.read_text()
    for names in ("vgg,", "a b", "../x:y"):
        with pytest.raises(UsageError, match="MARTEN_MODELS"):
            for_models(shipped / "envoy.yaml", names, folder)


@pytest.mark.parametrize("key", ["", "two words", 'a"b', "a\nb", "schlüssel"])
def test_a_key_cannot_break_out_of_its_header(key: str) -> None:
    with pytest.raises(ServerError, match="a key is made of"):
        keys_text([key])


def test_addresses_are_read_as_people_write_them() -> None:
    assert parse_address("8443") == Address("127.0.0.1", 8443)
    assert parse_address("localhost:8443") == Address("127.0.0.1", 8443)
    assert parse_address("0.0.0.0:443") == Address("0.0.0.0", 443)
    assert parse_address("[::1]:443") == Address("::1", 443)
    for wrong in ("door", "door:80", "1.2.3.4:0", "1.2.3.4:70000"):
        with pytest.raises(UsageError):
            parse_address(wrong)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_the_network_is_refused_without_tls_and_key(host: str) -> None:
    with pytest.raises(UsageError, match="takes TLS and a key"):
        Door(Address(host, 8443), None)
    assert Door(Address("127.0.0.1", 8443), None).url == "http://localhost:8443"


def test_serve_refuses_to_expose_without_secrets() -> None:
    words = ["start", "vgg", "--expose", "0.0.0.0:8443"]
    told = subprocess.run([sys.executable, str(ROOT / "scripts/serve"), *words], capture_output=True, text=True)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert "takes TLS and a key" in told.stderr


def test_flags_of_a_door_mean_nothing_without_one() -> None:
    words = ["start", "vgg", "--secrets", "s", "--replicas", "2", "--otlp", "collector:4318"]
    told = subprocess.run([sys.executable, str(ROOT / "scripts/serve"), *words], capture_output=True, text=True)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert "--secrets, --replicas, --otlp belongs to a front door" in told.stderr
    with pytest.raises(UsageError, match="--otlp collector:4318"):
        parse_address("collector:4318", "--otlp")


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.2", "[::]"])
def test_replicas_never_listen_beside_their_door(tmp_path: Path, host: str) -> None:
    build_archive(tmp_path / "store", "echo")
    config = tmp_path / "config.properties"
    config.write_text(CONFIG.read_text() + f"inference_address=http://{host}:8080\n")
    with pytest.raises(UsageError, match="shows inference to the network"):
        fleet.Crew(store=tmp_path / "store", config=config).settings(1)


def routes_of(config: Path) -> list[dict[str, Any]]:
    tree = yaml.safe_load(config.read_text())
    chain = tree["static_resources"]["listeners"][0]["filter_chains"][0]
    routes = chain["filters"][0]["typed_config"]["route_config"]["virtual_hosts"][0]["routes"]
    assert isinstance(routes, list)
    return routes


def test_each_model_has_its_route_and_heat_maps_only_where_asked(tmp_path: Path) -> None:
    door = Door(Address("127.0.0.1", 1), None)
    for explanations in (False, True):
        asked = dataclasses.replace(door, explanations=explanations)
        routes = routes_of(write_config(asked, ["a", "b.c"], [Address("127.0.0.1", 2)], tmp_path))
        passed = {r["match"].get("path_separated_prefix") or r["match"]["path"] for r in routes if "route" in r}
        heat_maps = {"/explanations/a", "/explanations/b.c"} if explanations else set()
        assert passed == {"/predictions/a", "/predictions/b.c", "/ping", *heat_maps}
        assert not any("runtime_fraction" in route["match"] for route in routes)
    clusters = json.loads((tmp_path / "replicas.yaml").read_text())["resources"]
    assert [c["health_checks"][0]["http_health_check"]["path"] for c in clusters] == [
        "/predictions/a",
        "/predictions/b.c",
    ]


def test_every_file_of_the_page_has_a_route() -> None:
    served = {
        r["direct_response"].get("body", {}).get("filename")
        for r in routes_of(PROXY / "envoy.yaml")
        if "direct_response" in r
    }
    assert served - {None} == {f"/srv/web/{file.name}" for file in PAGE.iterdir() if file.is_file()}


def test_a_leak_is_told_from_noise() -> None:
    steady = [(t, 100e6 + 1e6 * (t % 3)) for t in range(600)]
    leaking = [(t, 100e6 + 20e3 * t) for t in range(600)]
    assert abs(slope_mb_h(steady)) < 1 < allowed_mb_h(600) < 60 < slope_mb_h(leaking)


# ------------------------------------------------------------------------------------------------ with Envoy


class Replica(BaseHTTPRequestHandler):
    """Answers as TorchServe would, and fails as its `server.mood` says."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        golden = len(body) < 200  # the door's own question
        mood = server.mood
        if golden and mood != "frozen":
            mood = "well"
        server.seen += not golden
        if mood == "frozen":
            server.thaw.wait(30)
        if mood == "dying":  # no answer at all
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if mood == "slow":
            time.sleep(0.3)
        status = int(mood) if mood.isdigit() else 200
        told = {"bytes": len(body), "type": self.headers["Content-Type"], "port": server.server_address[1]}
        told |= {"request_id": self.headers["X-Request-Id"], "key": self.headers["Authorization"]}
        told["kind"] = [name for name in ("explain", "describe") if name in self.headers]
        answer = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET = do_OPTIONS = do_DELETE = do_PUT  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def replica() -> Iterator[Any]:
    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 200

        def handle_error(self, *_: Any) -> None:  # a caller that left
            pass

    server: Any = Server(("127.0.0.1", 0), Replica)
    server.mood, server.seen, server.thaw = "well", 0, threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.thaw.set()
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Opened:
    """An Envoy of the tests' own, before two replicas."""

    entrance: Entrance
    door: Door
    folder: Path
    pid: int
    replicas: list[Any]

    @property
    def admin(self) -> Path:
        return self.folder / "admin.sock"

    def ask(
        self,
        path: str = "/predictions/m",
        method: str = "PUT",
        body: bytes | None = b"x" * 1000,
        key: str | None = "",
        **more: str,
    ) -> tuple[int, dict[str, str], dict[str, Any]]:
        connection = self.entrance.connect(self.entrance.context())
        headers = {name.replace("_", "-"): value for name, value in more.items()}
        if key is not None:
            headers["Authorization"] = f"Bearer {key or self.entrance.key}"
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            kind = answer.headers["Content-Type"] or ""
            named = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, named, json.loads(data) if "json" in kind else {"text": data.decode()}


def open_door(
    folder: Path, change: Callable[[dict[str, Any]], None] = lambda text: None, **settings: Any
) -> Iterator[Opened]:
    try:
        envoy.find_envoy()
    except ServerError as error:
        pytest.skip(str(error))
    secrets, _ = open_or_make(folder / "secrets")
    (folder / "logs").mkdir()
    door = Door(Address("127.0.0.1", free_ports(1)[0]), folder / "secrets", **settings)
    with replica() as first, replica() as second:
        addresses = [Address("127.0.0.1", each.server_address[1]) for each in (first, second)]
        config = write_config(door, ["m"], addresses, folder)
        tree = json.loads(config.read_text())
        change(tree)
        config.write_text(json.dumps(tree))
        pid = envoy.launch(config, folder / "logs", 1)
        made = Opened(Entrance(door.url, secrets.certificate, secrets.key), door, folder, pid, [first, second])
        try:
            wait_until(lambda: is_up(made, 2), 20)
            yield made
        finally:
            envoy.drain(made.admin, pid, 0)
            assert find_process(pid) is None


def is_up(opened: Opened, replicas: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return envoy.read_stat(opened.admin, "cluster.m.membership_healthy") == replicas
    return False


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    yield from open_door(tmp_path)


def manager_of(tree: dict[str, Any]) -> dict[str, Any]:
    found = tree["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    assert isinstance(found, dict)
    return found


def shorten(tree: dict[str, Any]) -> None:
    manager_of(tree).update(request_headers_timeout="0.5s", request_timeout="1s")


@pytest.mark.door
def test_who_holds_the_key_is_answered_and_nobody_else(opened: Opened) -> None:
    status, headers, told = opened.ask()
    assert (status, told["bytes"], told["key"]) == (200, 1000, None)  # TorchServe never sees the key
    assert opened.ask(explain="True", describe="True")[2]["kind"] == []  # nor what would make it answer otherwise
    assert told["request_id"] == headers["x-request-id"]
    for key in (None, "wrong", opened.entrance.key + "x", opened.entrance.key[:-1]):
        status, headers, told = opened.ask(key=key)
        assert (status, headers["www-authenticate"], told["code"]) == (401, "Bearer", 401)
    assert sum(each.seen for each in opened.replicas) == 2
    log = (opened.folder / "logs" / "access.jsonl").read_text

    def logged() -> set[int]:
        return {json.loads(line)["status"] for line in log().splitlines(keepends=True) if line.endswith("\n")}

    wait_until(lambda: logged() >= {200, 401}, 15)
    assert opened.entrance.key not in log()


@pytest.mark.door
def test_nothing_but_pictures_gets_through(opened: Opened) -> None:
    assert opened.ask("/ready", "GET", None, None)[0] == 200
    assert opened.ask("/ping", "GET", None, None)[0] == 200
    seen = sum(each.seen for each in opened.replicas)
    for method, path in [
        ("GET", "/models"),
        ("PUT", "/models/m?min_worker=9"),
        ("POST", "/models?url=http://192.0.2.1/evil.mar"),
        ("PUT", "/explanations/m"),
        ("OPTIONS", "/"),
        ("PUT", "/predictions/../models/m"),
        ("PUT", "/predictions/another"),
        ("PUT", "/v1/models/m:predict"),
        ("GET", "/metrics"),
    ]:
        status, _, told = opened.ask(path, method)
        assert (status, told["code"]) == (404, 404), path
    assert opened.ask("/predictions%2f..%2fmodels", "GET")[0] == 400
    for method in ("GET", "DELETE", "PATCH"):
        status, headers, told = opened.ask(method=method)
        assert (status, headers["allow"], told["code"]) == (405, "PUT, POST", 405)
    assert sum(each.seen for each in opened.replicas) == seen


@pytest.mark.door
@pytest.mark.parametrize("explanations", [True, False])
def test_heat_maps_are_offered_where_somebody_opted_in(tmp_path: Path, explanations: bool) -> None:
    for opened in open_door(tmp_path, explanations=explanations):
        assert opened.ask("/explanations/m")[0] == (200 if explanations else 404)


@pytest.mark.door
def test_the_page_is_there_for_everybody(opened: Opened) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/style.css", "text/css")):
        status, headers, told = opened.ask(path, "GET", None, None)
        assert (status, headers["content-type"].partition(";")[0]) == (200, kind)
        assert told["text"] == (PAGE / (path[1:] or "index.html")).read_text()
    assert opened.ask("/models.json", "GET", None, None)[2] == {"models": ["m"]}


@pytest.mark.door
def test_a_picture_that_curl_calls_a_form_arrives_as_a_picture(opened: Opened) -> None:
    kind = opened.ask(content_type="application/x-www-form-urlencoded")[2]["type"]
    assert kind == "application/octet-stream"
    assert opened.ask(content_type="image/jpeg")[2]["type"] == "image/jpeg"
    assert opened.ask(content_type="multipart/form-data; boundary=b")[2]["type"] == "multipart/form-data; boundary=b"


@pytest.mark.door
def test_more_than_16_mib_is_413_and_16_mib_are_not(opened: Opened) -> None:
    limit = 16 * 2**20
    assert opened.ask(body=bytes(limit))[2]["bytes"] == limit
    status, _, told = opened.ask(body=bytes(limit + 100_000))
    assert (status, told["code"], told["message"]) == (413, 413, "more than 16 MiB")


@pytest.mark.door
def test_half_a_request_is_408_and_keeps_no_replica_waiting(tmp_path: Path) -> None:
    for opened in open_door(tmp_path, shorten):
        header = "PUT /predictions/m HTTP/1.1\r\nHost: d\r\n"
        rest = f"Authorization: Bearer {opened.entrance.key}\r\nContent-Length: 900\r\n\r\nabc"
        for text in (header, header + rest):
            with opened.entrance.context().wrap_socket(opened.entrance.dial(), server_hostname="localhost") as half:
                half.sendall(text.encode())
                assert half.recv(100).startswith(b"HTTP/1.1 408 ")
        assert sum(each.seen for each in opened.replicas) == 0
        assert opened.ask()[0] == 200


@pytest.mark.door
@pytest.mark.parametrize("mood", ["500", "503", "507", "dying"])
def test_what_one_replica_fails_another_answers(opened: Opened, mood: str) -> None:
    opened.replicas[0].mood = mood
    well = opened.replicas[1].server_address[1]
    for asked in range(60):  # Envoy throws a coin for each: six in a row spared the failing one in 1 of 64 runs
        status, _, answer = opened.ask(body=os.urandom(2_000_000))
        assert (status, answer["bytes"], answer["port"]) == (200, 2_000_000, well)
        if asked >= 5 and opened.replicas[0].seen >= 3:
            break
    assert opened.replicas[0].seen >= 3


@pytest.mark.door
@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_pictures_own_fault_is_told_at_once(opened: Opened, status: int) -> None:
    for each in opened.replicas:
        each.mood = str(status)
    assert opened.ask()[0] == status
    assert sum(each.seen for each in opened.replicas) == 1


@pytest.mark.door
def test_when_every_try_fails_it_says_when_to_come_again(opened: Opened) -> None:
    for each in opened.replicas:
        each.mood = "507"
    status, headers, _ = opened.ask()
    assert (status, headers["retry-after"]) == (503, "1")
    assert sum(each.seen for each in opened.replicas) == 11


@pytest.mark.door
def test_a_frozen_replica_is_noticed_and_what_it_owed_is_asked_elsewhere(opened: Opened) -> None:
    opened.replicas[0].mood = "frozen"
    begun = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        told = [pool.submit(lambda: opened.ask()[0]) for _ in range(6)]
        wait_until(lambda: is_up(opened, 1), allowed_s(5))
        assert [each.result() for each in told] == [200] * 6
    assert time.monotonic() - begun < allowed_s(14)  # per_try_timeout, and then the other one's answer
    assert opened.ask("/ready", "GET", None, None)[0] == 200
    opened.replicas[1].mood = "frozen"
    wait_until(lambda: opened.ask("/ready", "GET", None, None)[0] == 503, allowed_s(5))


@pytest.mark.door
def test_a_caller_beyond_its_rate_is_429(tmp_path: Path) -> None:
    for opened in open_door(tmp_path, per_second=5):
        told = [opened.ask() for _ in range(25)]
        refused = [
            (status, headers["retry-after"], answer["code"]) for status, headers, answer in told if status != 200
        ]
        assert {status for status, _, _ in told} == {200, 429}
        assert set(refused) == {(429, "1", 429)}


@pytest.mark.door
def test_beyond_what_can_be_answered_soon_the_refusal_is_quick(tmp_path: Path) -> None:
    for opened in open_door(tmp_path, in_flight=4, per_second=100_000):
        for each in opened.replicas:
            each.mood = "slow"
        with Crowd(opened.entrance, "m", [b"x" * 1000], clients=16, pause_s=0.05) as crowd:
            time.sleep(1.5)
        statuses = {each.status for each in crowd.asked}
        assert statuses == {200, 503}
        assert all(each.retry_after for each in crowd.failed)
        refused = sorted(each.took_s for each in crowd.failed)
        assert refused[len(refused) // 2] < allowed_s(0.05)
        assert crowd.latency_s(50) < allowed_s(0.6)  # nobody queued behind the others


@pytest.mark.door
def test_replicas_come_and_go_without_a_lost_request(opened: Opened) -> None:
    first, second = (Address("127.0.0.1", each.server_address[1]) for each in opened.replicas)
    for each in opened.replicas:
        each.mood = "slow"
    with Crowd(opened.entrance, "m", [b"x" * 1000], clients=4) as crowd:
        for at in ([first], [second], [first, second], [second], [first]):
            set_replicas(opened.folder, ["m"], at)
            time.sleep(1.5)
    assert crowd.failed == []
    assert len(crowd.answered) >= 10
    assert all(each.seen for each in opened.replicas)


@pytest.mark.door
def test_closing_waits_for_the_answers_under_way(tmp_path: Path) -> None:
    for opened in open_door(tmp_path):
        for each in opened.replicas:
            each.mood = "slow"
        with ThreadPoolExecutor(4) as pool:
            under_way = [pool.submit(opened.ask) for _ in range(4)]
            while sum(each.seen for each in opened.replicas) < 4:
                time.sleep(0.02)
            assert envoy.drain(opened.admin, opened.pid, 10) == 0
        assert [each.result()[0] for each in under_way] == [200] * 4


@pytest.mark.door
def test_keys_are_changed_without_a_restart(opened: Opened) -> None:
    new = opened.folder / "secrets" / "new.yaml"
    new.write_text(keys_text(["another-key", opened.entrance.key]))
    assert opened.ask(key="another-key")[0] == 401
    new.replace(opened.folder / "secrets" / "keys.yaml")
    wait_until(lambda: opened.ask(key="another-key")[0] == 200, 5)
    assert opened.ask()[0] == 200


@pytest.mark.door
def test_spans_reach_a_collector_and_figures_prometheus(tmp_path: Path) -> None:
    collected: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = b""  # it comes in chunks
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size + 2)
            self.rfile.readline()
            collected.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        ports = free_ports(1)
        spans = Address("127.0.0.1", server.server_address[1])
        for opened in open_door(tmp_path, metrics_port=ports[0], collector=spans):
            request_id = opened.ask()[1]["x-request-id"].encode()
            deadline = time.monotonic() + 20
            while not any(request_id in body for _, body in collected):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert {path for path, _ in collected} == {"/v1/traces"}
            connection = http.client.HTTPConnection("127.0.0.1", ports[0], timeout=10)
            connection.request("GET", "/stats/prometheus")
            told = connection.getresponse().read().decode()
            assert (
                'envoy_http_downstream_rq_xx{envoy_response_code_class="2",envoy_http_conn_manager_prefix="door"}'
                in told
            )
            connection.request("POST", "/quitquitquit")
            assert connection.getresponse().status == 404
            connection.close()
        server.shutdown()
        thread.join()


@pytest.mark.door
def test_envoy_takes_the_shipped_files(tmp_path: Path) -> None:
    """As the container's service has them, but for places that exist here."""
    try:
        program = envoy.find_envoy()
    except ServerError as error:
        pytest.skip(str(error))
    open_or_make(tmp_path / "secrets")
    for name in ("envoy.yaml", "replicas.yaml"):
        text = (PROXY / name).read_text().replace("/etc/envoy", str(tmp_path)).replace("/srv/web", str(PAGE))
        (tmp_path / name).write_text(text)
    (tmp_path / "told").mkdir()
    for config in (tmp_path / "envoy.yaml", for_models(tmp_path / "envoy.yaml", "vgg", tmp_path / "told")):
        words = [program, "-c", config, "--mode", "validate", "-l", "warning"]
        told = subprocess.run(words, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        assert not re.search("deprecat|work-in-progress", told.stderr, re.IGNORECASE), told.stderr


# ------------------------------------------------------------------------------------------------ on several machines

ELSEWHERE = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Replica(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = b'{"host": "%s"}' % sys.argv[1].encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *words):
        pass
ThreadingHTTPServer((sys.argv[1], 8080), Replica).serve_forever()
"""


@contextlib.contextmanager
def serving(elsewhere: Machine) -> Iterator[None]:
    """A server on another machine, which tells its address."""
    with subprocess.Popen([*elsewhere.inside, sys.executable, "-c", ELSEWHERE, elsewhere.far]) as process:
        try:
            yield
        finally:
            process.kill()


@pytest.mark.door
def test_a_machine_whose_wire_is_cut_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        envoy.find_envoy()
    except ServerError as error:
        pytest.skip(str(error))
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("making network namespaces needs root and the command ip")
    monkeypatch.setenv("MARTEN_RUNTIME", str(tmp_path / "run"))
    secrets, _ = open_or_make(tmp_path / "secrets")
    with machine(1) as first, machine(2) as second, serving(first), serving(second):
        door = Door(Address("127.0.0.1", free_ports(1)[0]), tmp_path / "secrets", per_second=100_000)
        made = fleet.open_before(door, ["m"], [Address(first.far, 8080), Address(second.far, 8080)])
        try:
            assert [status.ready for status in fleet.check(made)] == [True, True]
            with Crowd(Entrance(made.url, secrets.certificate, secrets.key), "m", [b"x" * 1000], 3) as crowd:
                time.sleep(1)
                subprocess.run(first.cut, check=True)
                wait_until(lambda: not made.known()[f"{first.far}:8080"], allowed_s(6))
                time.sleep(1)
            assert crowd.failed == []
            assert len(crowd.answered) > 20
            with pytest.raises(UsageError, match="run elsewhere"):
                fleet.update(made, fleet.Crew())
        finally:
            fleet.stop(made)


# ------------------------------------------------------------------------------------------------ with TorchServe


@pytest.mark.door
@pytest.mark.server
@pytest.mark.slow
def test_an_update_under_load_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        envoy.find_envoy()
    except ServerError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MARTEN_RUNTIME", str(tmp_path / "run"))
    build_archive(tmp_path / "store", "echo")
    secrets, _ = open_or_make(tmp_path / "secrets")
    crew = fleet.Crew(store=tmp_path / "store", workers=1)
    door = Door(Address("127.0.0.1", free_ports(1)[0]), tmp_path / "secrets", per_second=100_000)
    made = fleet.start(door, crew, timeout_s=300)
    try:
        assert [status.ready for status in fleet.check(made)] == [True]
        with Crowd(Entrance(made.url, secrets.certificate, secrets.key), "echo", [golden_picture()], 3) as crowd:
            updated = fleet.update(made, crew, 300)
            time.sleep(0.5)
        assert crowd.failed == []
        assert len(crowd.answered) > 10
        assert updated.replicas != made.replicas
        os.kill(updated.running()[0].pid, signal.SIGKILL)
        wait_until(lambda: updated.running() == [], 10)
        mended = fleet.mend(updated, crew, 300)
        assert mended.replicas != updated.replicas
        wait_until(lambda: mended.is_healthy(mended.replicas[0]), 20)
        assert find_process(made.pid) is not None
    finally:
        last = fleet.find(made.port)
        assert last is not None
        assert fleet.stop(last) == 0
    assert fleet.find(made.port) is None
    assert last.running() == []
