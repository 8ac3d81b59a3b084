"""The stack of deployment/compose.yaml, brought up for real: server and front door, which need no foreign image."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

import pytest

from marten.files import ROOT
from marten.readiness import free_ports
from tests.containers import build_image, packages, podman, require_engine
from tests.servers import allowed_s, build_archive

COMPOSE = shutil.which("podman-compose", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@dataclass(frozen=True)
class Project:
    """One stack with a name and a port of its own.

    Attributes:
        name: what its containers' names begin with.
        override: compose file on top of ours that names the images and mounts this interpreter's packages.
        settings: what the compose file reads from the environment.
        port: of the front door.
    """

    name: str
    override: Path
    settings: dict[str, str]
    port: int

    def run(self, *words: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        files = ["-f", str(ROOT / "deployment" / "compose.yaml"), "-f", str(self.override)]
        command = [str(COMPOSE), "-p", self.name, *files, *words]
        environment = {**os.environ, **self.settings}
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)

    def ask(self, path: str, key: str = "", body: bytes = b"a picture") -> tuple[int, bytes]:
        """Status and body from the front door, 0 where nobody listens yet."""
        context = ssl._create_unverified_context()  # its certificate lies in a volume
        connection = HTTPSConnection("localhost", self.port, timeout=30, context=context)
        try:
            connection.request("PUT", path, body, {"Authorization": f"Bearer {key}"} if key else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, HTTPException) as error:
            return 0, repr(error).encode()
        finally:
            connection.close()


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    require_engine()
    if COMPOSE is None:
        pytest.skip("podman-compose is not installed")
    server = build_image("serve", "docker/serve.Dockerfile", "--target", "server")
    proxy = build_image("proxy", "proxy/Dockerfile")
    build_archive(tmp_path / "store", "echo")
    tmp_path.chmod(0o755)
    mount = packages().partition("=")[2]
    services = {"server": {"image": server, "volumes": [mount]}, "proxy": {"image": proxy, "volumes": [mount]}}
    override = tmp_path / "override.yaml"
    override.write_text(json.dumps({"services": services}), encoding="utf-8")
    (port,) = free_ports(1)
    settings = {"MARTEN_STORE": str(tmp_path / "store"), "MARTEN_MODELS": "echo", "MARTEN_PORT": str(port)}
    made = Project(f"marten-test-{os.getpid()}", override, settings, port)
    yield made
    made.run("down", "--volumes", "--timeout", "1")


@pytest.mark.container
def test_the_stack_answers_through_its_door_alone(project: Project) -> None:
    done = project.run("up", "--detach", "server", "proxy")
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + allowed_s(120)
    while project.ask("/predictions/echo")[0] != 401:
        assert time.monotonic() < deadline, project.run("logs").stdout
        time.sleep(0.5)
    key = project.run("exec", "-T", "proxy", "cat", "/etc/envoy/secrets/key").stdout.strip()
    assert len(key) >= 40
    while project.ask("/predictions/echo", key)[0] != 200:
        assert time.monotonic() < deadline, project.run("logs").stdout
        time.sleep(0.5)
    assert json.loads(project.ask("/predictions/echo", key)[1])
    assert project.ask("/models", key)[0] == 404
    assert project.ask("/predictions/dogs_vs_cats", key)[0] == 404  # the store that was named, and no other
    published = {name: podman("port", f"{project.name}_{name}_1").stdout.split()[-1:] for name in ("server", "proxy")}
    assert published == {"server": [], "proxy": [f"127.0.0.1:{project.port}"]}
    out = project.run(
        "exec", "-T", "server", "python3", "-c", "import socket\nsocket.create_connection(('192.0.2.1', 80), 3)"
    )
    assert "unreachable" in out.stderr  # no way out, not merely nobody there
    stopped = podman("stop", "--time", "30", f"{project.name}_server_1")
    assert stopped.returncode == 0, stopped.stderr
    status, told = project.ask("/predictions/echo", key)
    assert (status, json.loads(told)["code"]) == (503, 503)
    assert podman("start", f"{project.name}_server_1").returncode == 0
    while project.ask("/predictions/echo", key)[0] != 200:
        assert time.monotonic() < deadline, project.run("logs").stdout
        time.sleep(0.5)
