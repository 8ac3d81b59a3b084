"""Real containers for the tests: podman, our Dockerfiles without their packages, this interpreter's mounted instead.

MARTEN_CONTAINER_TOOLS names a folder with setup-containers.sh, which readies podman and an image that is called
python:3.11-slim-bookworm; without it these tests are skipped. Where both are there already an empty script does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from marten.files import ROOT
from marten.readiness import Address, free_ports
from tests.servers import Asked, allowed_s, build_archive

BASE = "python:3.11-slim-bookworm"
HARDENED = ["--read-only", "--tmpfs=/tmp:rw,mode=1777,size=256m", "--cap-drop=ALL", "--security-opt=no-new-privileges"]


def podman(*words: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["podman", *words], capture_output=True, text=True, timeout=timeout_s)


def require_engine() -> None:
    """Set podman up, or skip and say why."""
    tools = os.environ.get("MARTEN_CONTAINER_TOOLS")
    if not tools:
        pytest.skip("needs a container engine: set MARTEN_CONTAINER_TOOLS to the folder of setup-containers.sh")
    if sys.version_info[:2] != (3, 11):
        pytest.skip(f"needs Python 3.11, as in the image, found {sys.version.split()[0]}")
    script = Path(tools) / "setup-containers.sh"
    done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=600)
    if done.returncode or not shutil.which("podman"):
        pytest.skip(f"{script}: {(done.stdout + done.stderr).strip().splitlines()[-1:]}")


def build_image(kind: str, dockerfile: str, *words: str) -> str:
    """Build one of our Dockerfiles as it stands, but for the packages, and give the image's name."""
    name = f"localhost/marten-test-{kind}"
    file = str(ROOT / "deployment" / dockerfile)
    arguments = [f"--build-arg=BASE_IMAGE={BASE}", "--build-arg=PACKAGES=pip"]
    done = podman("build", "--format", "docker", *arguments, *words, "-f", file, "-t", name, str(ROOT), timeout_s=600)
    assert done.returncode == 0, done.stderr
    return name


def packages() -> str:
    """Mount the packages of this interpreter where the image's own would be."""
    return f"--volume={sysconfig.get_paths()['purelib']}:/usr/local/lib/python3.11/site-packages:ro"


@dataclass
class Container(Asked):
    """One running server, published on a port of this machine's loopback."""

    name: str
    store: Path
    port: int = field(default_factory=lambda: free_ports(1)[0])

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.port)

    def start(self, image: str, *flags: str, models: tuple[str, ...] = ()) -> None:
        """Run it detached, with everything taken away that it does not need."""
        where = ["--publish", f"127.0.0.1:{self.port}:8080", "--volume", f"{self.store}:/models:ro", packages()]
        named = ["--detach", "--name", self.name]
        done = podman("run", *named, *HARDENED, *where, *flags, image, *models, "--workers=1", "--timeout_s=900")
        assert done.returncode == 0, done.stderr

    def wait_ready(self) -> None:
        deadline = time.monotonic() + allowed_s(60)
        while "stop:" not in self.logs():
            assert self.inspect("State")["Status"] == "running", self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.3)

    def wait_exit(self) -> int:
        """Its exit code, once it has ended."""
        deadline = time.monotonic() + allowed_s(60)
        while (state := self.inspect("State"))["Status"] == "running":
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.3)
        return int(state["ExitCode"])

    def logs(self) -> str:
        told = podman("logs", self.name)
        return told.stdout + told.stderr

    def inspect(self, part: str) -> dict[str, Any]:
        return dict(json.loads(podman("inspect", self.name).stdout)[0][part])

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return podman("exec", self.name, *words, timeout_s=300)


@pytest.fixture(scope="session")
def serve_image() -> str:
    require_engine()
    return build_image("serve", "docker/serve.Dockerfile", "--target", "server")


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    """A store with the archive "echo", nothing started; what a test starts is removed after it."""
    build_archive(tmp_path / "store", "echo")
    tmp_path.chmod(0o755)
    made = Container(f"marten-test-{os.getpid()}-{tmp_path.name[-12:]}", tmp_path / "store")
    yield made
    podman("rm", "--force", "--time", "1", made.name)
