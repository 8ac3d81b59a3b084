"""scripts/serve against a real TorchServe: what answers, what fails and how it says so, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from marten import server
from marten.readiness import Address, request, worker_pids
from marten.serverconfig import CONFIG, read_properties, read_settings
from tests.servers import (
    FAILING,
    LACKING,
    ROOT,
    SLOW,
    Clients,
    Serve,
    allowed_s,
    build_archive,
    echo_server,
    free_ports,
    serve,
    wait_until,
)

__all__ = ["echo_server", "serve"]
pytestmark = pytest.mark.server


def test_answers_and_says_where(echo_server: Serve) -> None:
    status, body = echo_server.ask("echo", b"12345")
    assert (status, json.loads(body)["bytes"]) == (200, 5)
    told = echo_server.run("status")
    assert told.returncode == 0
    assert told.stdout.startswith("echo  ready, ")


def test_workers_run_this_python_and_nothing_shadows_the_archive(echo_server: Serve) -> None:
    answer = json.loads(echo_server.ask("echo")[1])
    assert answer["python"] == sys.executable
    assert answer["where"] == "in the archive"


def test_a_second_start_of_the_same_is_content_and_of_another_is_refused(echo_server: Serve) -> None:
    before = echo_server.pid
    again = echo_server.run("start", "echo")
    assert again.returncode == 0
    assert "already running" in again.stdout
    other = echo_server.run("start", "echo", "--workers", "2")
    assert other.returncode == 1
    assert "a server is running with echo" in other.stderr
    assert "serve restart" in other.stderr
    assert echo_server.pid == before


def test_b1_15_listens_on_loopback_alone_and_takes_no_models(echo_server: Serve) -> None:
    """B1-15: every interface was open to the network, model upload included."""
    listening = [c for c in psutil.Process(echo_server.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.port for c in listening} >= set(echo_server.ports)
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}
    management = Address("127.0.0.1", echo_server.ports[1])
    assert request(management, "POST", "/models?url=file:///etc/hostname")[0] == 405
    assert request(management, "DELETE", "/models/echo")[0] == 405
    assert not list(echo_server.store.glob("hostname"))


def test_b1_16_no_token_is_asked_and_the_first_answer_has_been_given(echo_server: Serve) -> None:
    """B1-16: the plain curl was refused for want of a token, and the first request took 27 s."""
    begun = time.monotonic()
    assert echo_server.ask("echo")[0] == 200
    assert time.monotonic() - begun < 5
    assert not (echo_server.folder / "key_file.json").exists()


def test_metrics_are_told_and_large_photographs_taken(echo_server: Serve) -> None:
    assert echo_server.ask("echo", bytes(12 << 20))[0] == 200
    assert echo_server.ask("echo", bytes(17 << 20))[0] == 413
    status, text = request(Address("127.0.0.1", echo_server.ports[2]), "GET", "/metrics")
    assert status == 200
    assert b'ts_inference_requests_total{model_name="echo"' in text


@pytest.mark.parametrize(
    ("handler", "says"),
    [(FAILING, "ValueError: the card and the labels disagree"), (LACKING, "captum_of_another_age is missing here")],
    ids=["handler_raises", "package_missing"],
)
def test_a_model_that_cannot_load_is_told_in_one_line(serve: Serve, handler: str, says: str) -> None:
    build_archive(serve.store, "broken", handler)
    begun = time.monotonic()
    failed = serve.run("start")
    assert time.monotonic() - begun < allowed_s(15)
    assert failed.returncode == 1
    assert failed.stderr.startswith("serve: broken: ")
    assert says in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert serve.leftovers() == []


def test_a_model_that_loads_too_long_is_given_up(serve: Serve) -> None:
    build_archive(serve.store, "slow", SLOW)
    failed = serve.run("start", "slow", "--timeout_s", "6")
    assert failed.returncode == 1
    assert "no answer within 6 s from slow" in failed.stderr
    assert serve.leftovers() == []


def test_a_taken_port_is_named_with_its_holder(serve: Serve) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", serve.ports[1]))
        holder.listen()
        failed = serve.run("start")
    assert failed.returncode == 1
    assert f"port {serve.ports[1]} (management) cannot be had" in failed.stderr
    assert f"by process {os.getpid()}" in failed.stderr
    assert "--management_port" in failed.stderr
    assert serve.leftovers() == []


def test_sigterm_answers_what_was_asked_before(serve: Serve) -> None:
    """TorchServe itself resets every request in flight on SIGTERM: 8 of 8 were lost."""
    process = serve.foreground("echo")
    clients = Clients(serve, "echo", count=8, body=b"wait0.2")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    told = clients.stop()
    assert told.pop("refused") == 8
    assert set(told) == {"200"}
    assert told["200"] >= 8
    assert serve.leftovers() == []


def test_the_foreground_fails_when_torchserve_dies(serve: Serve) -> None:
    process = serve.foreground("echo")
    os.kill(serve.pid, signal.SIGKILL)
    assert process.wait(30) == 1
    assert "has ended, and nobody asked it to" in serve.output.read_text()
    assert serve.leftovers() == []


def test_sigterm_while_starting_leaves_nothing(serve: Serve) -> None:
    process = subprocess.Popen(serve.command("start"), stderr=subprocess.DEVNULL, env=serve.environment())
    wait_until((serve.folder / "state.json").exists, 30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert serve.leftovers() == []


def test_sigterm_while_others_load_answers_what_the_first_was_asked(serve: Serve) -> None:
    build_archive(serve.store, "slow", SLOW)
    process = subprocess.Popen(
        serve.command("start", "--foreground"), stderr=subprocess.DEVNULL, env=serve.environment()
    )
    wait_until(lambda: worker_pids(Address("127.0.0.1", serve.ports[1]), "echo"), allowed_s(30))
    clients = Clients(serve, "echo", count=4, body=b"wait0.5")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    told = clients.stop()
    assert told.pop("refused") == 4
    assert set(told) == {"200"}
    assert serve.leftovers() == []


def test_a_frozen_worker_is_noticed_and_replaced(serve: Serve) -> None:
    assert serve.run("start").returncode == 0
    (pid,) = worker_pids(Address("127.0.0.1", serve.ports[1]), "echo")
    os.kill(pid, signal.SIGSTOP)
    begun = time.monotonic()
    told = serve.run("status")
    assert time.monotonic() - begun < allowed_s(5)
    assert told.returncode == 1
    assert "echo  NOT READY: no answer within 4 s" in told.stdout
    wait_until(lambda: serve.run("status").returncode == 0, within_s=allowed_s(15) - (time.monotonic() - begun))
    assert worker_pids(Address("127.0.0.1", serve.ports[1]), "echo") != [pid]


def test_one_frozen_worker_of_two_is_not_ready(serve: Serve) -> None:
    assert serve.run("start", "--workers", "2").returncode == 0
    pids = worker_pids(Address("127.0.0.1", serve.ports[1]), "echo")
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGSTOP)
    assert serve.run("status").returncode == 1
    os.kill(pids[1], signal.SIGCONT)


def test_a_killed_worker_costs_its_own_request_at_most(serve: Serve) -> None:
    assert serve.run("start", "--workers", "2").returncode == 0
    clients = Clients(serve, "echo", count=4, body=b"wait0.05")
    time.sleep(0.5)
    os.kill(worker_pids(Address("127.0.0.1", serve.ports[1]), "echo")[0], signal.SIGKILL)
    longest = max(_latency_s(serve) for _ in range(20))
    told = clients.stop()
    assert longest < allowed_s(2)
    assert sum(count for status, count in told.items() if status != "200") <= 1
    assert told["200"] > 20


def _latency_s(serve: Serve) -> float:
    begun = time.monotonic()
    serve.ask("echo", b"wait0.05")
    return time.monotonic() - begun


def test_the_commands_by_hand_work_too(serve: Serve, tmp_path: Path) -> None:
    """The owner's `torchserve --start … --models a=a.mar b=b.mar` and `torchserve --stop`, on ports of our own."""
    build_archive(serve.store, "other")
    text = CONFIG.read_text(encoding="utf-8")
    for port, ours in zip((8080, 8081, 8082), serve.ports, strict=True):
        text = text.replace(f"=http://127.0.0.1:{port}", f"=http://127.0.0.1:{ours}")
    (tmp_path / "config.properties").write_text(text, encoding="utf-8")
    temp = tmp_path / "temp"
    temp.mkdir()
    places = {"TEMP": str(temp), "TMPDIR": str(temp), "LOG_LOCATION": str(temp), "METRICS_LOCATION": str(temp)}
    torchserve = [sys.executable, "-m", "ts.model_server"]
    start = ["--start", "--ncs", "--ts-config", str(tmp_path / "config.properties"), "--model-store", str(serve.store)]
    subprocess.run(
        [*torchserve, *start, "--models", "echo=echo.mar", "other=other.mar"],
        cwd=ROOT,
        env={**os.environ, **places},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    java = psutil.Process(int((temp / ".model_server.pid").read_text()))
    try:
        wait_until(lambda: serve.run("status").returncode == 0, 60)  # also of a server that it did not start
        assert serve.ask("other")[0] == 200
        by_hand = serve.run("start", "echo")
        assert by_hand.returncode == 1
        assert "torchserve --stop" in by_hand.stderr
    finally:
        subprocess.run([*torchserve, "--stop"], env={**os.environ, **places}, check=True, stdout=subprocess.DEVNULL)
        psutil.wait_procs([java], timeout=20)


def test_two_servers_run_side_by_side(serve: Serve, echo_server: Serve) -> None:
    assert serve.run("start").returncode == 0
    assert serve.ask("echo")[0] == echo_server.ask("echo")[0] == 200
    assert serve.run("stop").returncode == 0
    assert echo_server.ask("echo")[0] == 200


def test_every_line_of_the_config_is_known_to_torchserve() -> None:
    """A misspelt key would be ignored without a word."""
    import ts

    jar = Path(ts.__file__).parent / "frontend" / "model-server.jar"
    with zipfile.ZipFile(jar) as archive:
        known = archive.read("org/pytorch/serve/util/ConfigManager.class")
    keys = set(read_properties(CONFIG)) - {"vmargs"}  # read by torchserve's own start program
    assert sorted(key for key in keys if key.encode() not in known) == []


def test_status_and_stop_without_a_server() -> None:
    ports = free_ports()
    nowhere = Serve(Path("/nonexistent"), Path("/nonexistent"), ports)
    told = nowhere.run("status")
    assert told.returncode == 1
    assert "no TorchServe answers" in told.stderr
    assert nowhere.run("stop").returncode == 0


def test_restart_serves_the_new_archive_and_dry_run_starts_nothing(serve: Serve) -> None:
    dry = serve.run("start", "--dry_run")
    assert dry.returncode == 0
    assert "ts.model_server --start --ncs" in dry.stdout
    assert serve.leftovers() == []
    assert serve.run("start", "mine=echo.mar").returncode == 0
    with zipfile.ZipFile(serve.store / "echo.mar", "a") as archive:
        archive.writestr("note.txt", "built anew")
    stale = serve.run("start", "mine=echo.mar")
    assert stale.returncode == 1
    assert "from an older archive or config: scripts/serve restart" in stale.stderr
    assert serve.run("restart").returncode == 0
    assert serve.ask("mine")[0] == 200


def test_restart_takes_the_same_store_and_workers(serve: Serve) -> None:
    assert serve.run("start", "--workers", "2").returncode == 0
    words = [word for word in serve.command("restart", "--workers", "2") if word not in ("--workers", "2")]
    del words[words.index("--model_store") :][:2]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=serve.environment())
    assert done.returncode == 0, done.stderr
    assert serve.ask("echo")[0] == 200
    assert len(worker_pids(Address("127.0.0.1", serve.ports[1]), "echo")) == 2


def test_no_page_no_server(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        failed = serve.run("start", "--web", "--web_port", str(taken.getsockname()[1]))
    assert failed.returncode == 1
    assert "--web_port" in failed.stderr
    assert serve.leftovers() == []


def test_an_interrupt_before_java_is_known_leaves_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARTEN_RUNTIME", str(serve.runtime))
    serve.runtime.mkdir()
    ports = dict(zip(("inference", "management", "metrics"), serve.ports, strict=True))
    settings = read_settings((), serve.store, CONFIG, ports, workers=1)

    def interrupted(starter: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout == server._LAUNCH_S:
            wait_until((serve.folder / "temp" / ".model_server.pid").exists, allowed_s(20))
            raise KeyboardInterrupt
        return real(starter, timeout)

    real = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.start(settings)
    monkeypatch.undo()
    assert serve.leftovers() == []
