"""One run at a time in a folder: another is refused by name, and a dead one's lock holds nobody up."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marten import alone as module
from marten.alone import alone
from marten.errors import MartenError, TrainingError
from marten.files import ROOT

HOLDER = """
import os, sys, time
from pathlib import Path
from marten.alone import alone
with alone(Path(sys.argv[1])):
    if os.fork() == 0:  # as a loader process, which outlives a killed trainer
        os.close(1)
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model.run"


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock, and has a child."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "held\n"
    return started


def test_a_second_run_is_refused_and_told_who_is_there(folder: Path) -> None:
    with holder(folder) as other:
        try:
            began = time.monotonic()
            with pytest.raises(TrainingError, match=f"process {other.pid} on .* is training into .*model.run"):
                alone(folder).__enter__()
            assert time.monotonic() - began < 5  # on one machine there is nothing to wait for
        finally:
            os.killpg(other.pid, signal.SIGKILL)


def test_the_lock_of_a_killed_process_holds_nobody_up_though_its_children_live(folder: Path) -> None:
    with holder(folder) as other:
        try:
            other.kill()
            other.wait()
            assert (folder / "lock").exists()
            with alone(folder):
                assert (folder / "lock").read_text().split()[1] == str(os.getpid())
            assert not (folder / "lock").exists()
        finally:
            os.killpg(other.pid, signal.SIGKILL)


def test_a_lock_that_came_with_a_sandbox_holds_nobody_up(folder: Path) -> None:
    folder.mkdir()
    (folder / "lock").write_text("another-machine 4711\n")
    with alone(folder):
        pass


def test_a_lock_of_another_machine_is_waited_for(folder: Path) -> None:
    # a file server keeps the lock of a machine that died for a while, and its job is started again at once
    with holder(folder) as other:
        try:
            (folder / "lock").write_text("another-machine 4711\n")
            began = time.monotonic()
            with pytest.raises(TrainingError, match="process 4711 on another-machine"):
                alone(folder, patience_s=1.5).__enter__()
            assert time.monotonic() - began >= 1.5
            os.kill(other.pid, signal.SIGKILL)
            with alone(folder, patience_s=30):
                pass
        finally:
            os.killpg(other.pid, signal.SIGKILL)


def test_a_file_system_without_locks_has_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", refuse)
    assert fcntl.lockf is refuse
    with alone(folder):
        pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.run").write_text("a file")
    with pytest.raises(MartenError, match=r"cannot write .*lock: "):
        alone(tmp_path / "model.run").__enter__()


def test_train_main_refuses_a_second_run_with_exit_code_1(folder: Path, drawn_set: Path) -> None:
    with holder(folder) as other:
        try:
            flags = ["--conv_net", "cat_dog_conv_net", "--data_dir", str(drawn_set), "--device", "cpu"]
            command = [
                sys.executable,
                str(ROOT / "train_main.py"),
                *flags,
                "--model_path",
                str(folder.parent / "model.pth"),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        finally:
            os.killpg(other.pid, signal.SIGKILL)
    assert done.returncode == 1
    assert done.stderr.startswith(f"train_main.py: process {other.pid} on ")
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "metrics.jsonl").exists()
