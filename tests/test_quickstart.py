"""The first command on a fresh machine: what it needs, what it says when that is missing, and that it answers."""

from __future__ import annotations

import os
import shutil
import site
import socket
import subprocess
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers import ROOT, free_ports

# tells a version and has the modules that the environment says, and writes down what it was asked to install
STUB_PYTHON = """#!/bin/sh
case "$*" in
  *"import sys; print"*) echo "$STUB_VERSION" ;;
  *"sys.version_info <"*) [ "$STUB_VERSION" != 3.10 ] ;;
  *"import ensurepip"*) [ -z "$STUB_NO_VENV" ] ;;
  *"pip install"*) echo "$*" >> "$STUB_LOG"; exit ${STUB_PIP:-0} ;;
esac
"""
TOOLS = ("basename", "bash", "cat", "cksum", "dirname", "find", "id", "sed", "sh")


def write_stub(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STUB_PYTHON)
    path.chmod(0o755)


@pytest.fixture
def enter(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Enter the environment of a project that holds a requirements file and nothing else."""
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "environment.sh", project / "scripts")
    (project / "requirements.txt").write_text("rich==15.0.0\n")
    for name in TOOLS:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        code = "set -euo pipefail; source scripts/environment.sh; enter_environment requirements.txt"
        given = {
            "PATH": str(tmp_path / "bin"),
            "STUB_LOG": str(tmp_path / "log"),
            "STUB_VERSION": "3.11",
            **environment,
        }
        return subprocess.run(["bash", "-c", code], cwd=project, env=given, capture_output=True, text=True, timeout=20)

    return run


def test_no_python_at_all(enter: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    told = enter()
    assert told.returncode == 1
    assert "marten: Python 3.11 or newer is needed; there is no python3: apt-get install python3" in told.stderr


@pytest.mark.parametrize(
    ("version", "no_venv", "says"),
    [
        ("3.10", "", "python3 is Python 3.10"),
        ("3.11", "1", "cannot make environments: apt-get install python3.11-venv"),
    ],
)
def test_a_python_that_will_not_do(
    enter: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, version: str, no_venv: str, says: str
) -> None:
    write_stub(tmp_path / "bin" / "python3")
    told = enter(STUB_VERSION=version, STUB_NO_VENV=no_venv)
    assert told.returncode == 1
    assert says in told.stderr
    assert told.stderr.count("\n") == 1


def test_installs_once_until_the_requirements_change(
    enter: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    write_stub(tmp_path / "env" / "bin" / "python")
    installed = tmp_path / "log"
    for runs in (1, 1):
        assert enter(MARTEN_VENV=str(tmp_path / "env")).returncode == 0
        assert installed.read_text().count("install") == runs
    (tmp_path / "project" / "requirements.txt").write_text("rich==15.0.1\n")
    assert enter(MARTEN_VENV=str(tmp_path / "env")).returncode == 0
    assert installed.read_text().count("install") == 2


def test_a_failed_install_is_told_and_tried_again(
    enter: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    write_stub(tmp_path / "env" / "bin" / "python")
    for runs in (1, 2):
        told = enter(VIRTUAL_ENV=str(tmp_path / "env"), STUB_PIP="1")
        assert told.returncode == 1
        assert "pip could not install requirements.txt" in told.stderr
        assert (tmp_path / "log").read_text().count("install") == runs


def test_a_taken_port_is_told_before_the_long_download(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        begun = time.monotonic()
        told = subprocess.run(
            ["bash", ROOT / "scripts" / "quickstart.sh", "--port", str(port)],
            env={"PATH": os.environ["PATH"], "MARTEN_VENV": str(tmp_path), "MARTEN_RUNTIME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
    assert time.monotonic() - begun < 15
    assert told.returncode == 1
    assert told.stderr.startswith(f"marten: port {port} is taken by another program")


@pytest.fixture
def project(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    """A copy of the project with an untrained stand-in for the default model, and an environment that finds ours."""
    from marten.archive import plan_archive, write_archive

    copy = tmp_path / "project"
    unwanted = shutil.ignore_patterns(".*", "tests", "docs", "*.pth", "*.mar", "*.cdx.json", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    write_archive(plan_archive(tiny_model(name="dogs_vs_cats"), export_path=copy / "deployment" / "model-store"))
    venv.create(copy / ".venv", symlinks=True)
    (inner,) = (copy / ".venv" / "lib").glob("python*/site-packages")
    (inner / "outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return copy


@pytest.fixture
def stopped(project: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables of a machine without curl and Java; what was started there is stopped afterwards."""
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    environment = {"PATH": str(tmp_path / "bin"), "MARTEN_RUNTIME": str(tmp_path / "run"), "HOME": str(tmp_path)}
    yield environment
    for folder in (tmp_path / "run").glob("marten-*"):
        stop = [project / ".venv" / "bin" / "python", project / "scripts" / "serve", "stop", "--drain_s", "0"]
        subprocess.run([*stop, "--port", folder.name.rpartition("-")[2]], env=environment, check=True)


@pytest.mark.server
@pytest.mark.slow
def test_from_a_clone_to_an_answer_and_again_in_seconds(project: Path, stopped: dict[str, str]) -> None:
    port = free_ports(1)[0]
    url = f"http://127.0.0.1:{port}/predictions/dogs_vs_cats"
    command = ["bash", project / "scripts" / "quickstart.sh", "--port", str(port)]
    told = [run(command, {**stopped, "PATH": path}) for path in (stopped["PATH"], os.environ["PATH"])]
    for text, _ in told:
        assert "chelsea.png" in text
        assert '"cat":' in text or '"dog":' in text
        assert f"It goes on answering at  {url}\n" in text
        assert f"scripts/serve stop --port {port}\n" in text
    assert "Installing" not in told[1][0]
    assert told[1][1] < 15


def run(command: list[object], environment: dict[str, str]) -> tuple[str, float]:
    """What it printed and how many seconds it took."""
    begun = time.monotonic()
    told = subprocess.run([str(w) for w in command], env=environment, capture_output=True, text=True, timeout=240)
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout, time.monotonic() - begun
