"""A running TorchServe takes the next version over while clients ask, and keeps the old one when the next is ill."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from marten import store
from marten.serverconfig import CONFIG
from tests.servers import ECHO, FAILING, ROOT, Clients, Serve
from tests.servers import serve as serve  # a fixture
from tests.test_store import build_version

pytestmark = pytest.mark.server


def telling(version: str) -> str:
    """A handler that answers with its version."""
    return ECHO.replace('"bytes": len(body)', f'"version": "{version}"')


def scripts_store(serve: Serve, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "store"), *words, "--model_store", str(serve.store)]
    command += ["--port", str(serve.ports[0])]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, env=serve.environment())


def start(serve: Serve, tmp_path: Path, model_api: str = "true") -> None:
    """Serve version 1.0, with TorchServe's model API unless told otherwise."""
    store.add(serve.store, build_version(tmp_path, "1.0", telling("1.0")))
    (serve.store / "echo.mar").unlink()
    store.promote(serve.store, "echo", "1.0")
    config = tmp_path / "config.properties"
    changes = f"enable_model_api={model_api}\ndefault_response_timeout=3\n"
    config.write_text(CONFIG.read_text(encoding="utf-8") + changes, encoding="utf-8")
    started = serve.run("start", "echo", "--config", str(config))
    assert started.returncode == 0, started.stderr


def answered_version(serve: Serve) -> str:
    status, body = serve.ask("echo")
    assert status == 200, body
    return str(json.loads(body)["version"])


def test_versions_change_hands_without_a_lost_request(serve: Serve, tmp_path: Path) -> None:
    start(serve, tmp_path)
    store.add(serve.store, build_version(tmp_path, "2.0", telling("2.0")))
    clients = Clients(serve, "echo", count=4, body=b"a picture")
    promoted = scripts_store(serve, "promote", "echo", "2.0")
    version = answered_version(serve)
    back = scripts_store(serve, "rollback", "echo")
    told = clients.stop()
    assert (promoted.returncode, version) == (0, "2.0"), promoted.stderr
    assert (back.returncode, answered_version(serve)) == (0, "1.0"), back.stderr
    assert set(told) == {"200"}, told
    assert told["200"] > 20, told
    assert "already running" in serve.run("start", "echo", "--config", str(tmp_path / "config.properties")).stdout


def test_a_version_that_does_not_load_is_put_back(serve: Serve, tmp_path: Path) -> None:
    start(serve, tmp_path)
    store.add(serve.store, build_version(tmp_path, "2.0", FAILING))
    promoted = scripts_store(serve, "promote", "echo", "2.0")
    assert promoted.returncode == 1
    assert "the card and the labels disagree" in promoted.stderr
    assert "echo 1.0 is in place again" in promoted.stderr
    assert answered_version(serve) == "1.0"
    assert store.read_index(serve.store)["echo"].serving == "1.0"


def test_a_server_without_the_model_api_is_left_as_it_is(serve: Serve, tmp_path: Path) -> None:
    start(serve, tmp_path, model_api="false")
    store.add(serve.store, build_version(tmp_path, "2.0", telling("2.0")))
    promoted = scripts_store(serve, "promote", "echo", "2.0")
    assert promoted.returncode == 0
    assert "scripts/serve restart" in promoted.stdout
    assert answered_version(serve) == "1.0"
    assert scripts_store(serve, "rollout", "echo").returncode == 1
