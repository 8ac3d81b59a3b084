"""Real schedulers for tests: an HTCondor pool and a Slurm of two nodes on this machine, and a tiny training for them.

MARTEN_CLUSTER_TOOLS names a folder with start-condor.sh and start-slurm.sh; without it these tests are skipped.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from marten.files import ROOT
from modelspec import load_state_dict
from tests.pictures import draw, encode

TRAINING = (
    "--conv_net cat_dog_conv_net --batch_size 4 --validation_split 0.25 --num_workers 0 --device cpu --precision fp32"
    " --dropout 0.3 --data_dir train.zip"
)
FLAGS = shlex.split(TRAINING)
SMALL = ["--gpus", "0", "--cpus", "1", "--memory_gb", "1", "--disk_gb", "1", "--python", sys.executable]


def start(script: str, **settings: str) -> None:
    """Start a scheduler, or find it running."""
    tools = os.environ.get("MARTEN_CLUSTER_TOOLS")
    if not tools:
        pytest.skip(f"needs a scheduler: set MARTEN_CLUSTER_TOOLS to the folder of {script}")
    if os.geteuid() != 0:
        pytest.skip(f"{script} needs root")
    done = subprocess.run(
        ["bash", Path(tools) / script], env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        pytest.skip(f"{script}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")


def condor() -> Path:
    """A running HTCondor pool; returns the folder of its commands."""
    base = Path(os.environ.get("CONDOR_BASE", "/tmp/marten-cluster/condor"))
    seen = {"/tmp", str(ROOT), str(Path(sys.prefix)), str(Path(os.path.realpath(sys.executable)).parents[1])}
    start("start-condor.sh", CONDOR_BASE=str(base), CONDOR_BIND=" ".join(sorted(seen)))
    return base / "bin"


def slurm() -> None:
    """A running Slurm of two nodes."""
    start("start-slurm.sh")


def prepare(folder: Path) -> Path:
    """Put train.zip, 24 drawn pictures, into a folder that the pool's user may write to; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        for number in range(24):
            label = "dog" if number % 2 else "cat"
            picture = draw(number, (60, 50)).point([value // (1 + number % 2) for value in range(256)] * 3)
            archive.writestr(f"train/{label}.{number}.jpg", encode(picture, "JPEG"))
    subprocess.run(["chown", "-R", "2000", folder], check=True)
    for parent in (folder, *folder.parents):
        if parent.stat().st_mode & 0o077 == 0:  # pytest's own, closed to others
            parent.chmod(0o711)
    return folder


def command(*words: str, folder: Path, path: str = "", **environment: str) -> str:
    """Run a command of ours or of the scheduler and return what it printed."""
    env = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **environment}
    for name in ("SLURM_JOB_ID", "TMPDIR"):
        env.pop(name, None)
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def submit(cluster: str, folder: Path, *options: str, flags: tuple[str, ...], path: str = "") -> str:
    """scripts/submit, as a user types it; returns the job's number."""
    words = (sys.executable, str(ROOT / "scripts" / "submit"), "--cluster", cluster, *SMALL, *options)
    told = command(*words, "--", *FLAGS, *flags, folder=folder, path=path)
    return told.strip().rstrip(".").split()[-1]


def uninterrupted(folder: Path, *flags: str) -> Path:
    """The same training here, in one go; returns its weights."""
    prepare(folder)
    words = (*FLAGS, *flags, "--model_path", "out/model_here.pth")
    submit_ = (sys.executable, str(ROOT / "scripts" / "submit"), "--cluster", "local", "--python", sys.executable)
    command(*submit_, "--", *words, folder=folder)
    return folder / "out" / "model_here.pth"


def until(found: Callable[[], object], within_s: float, what: str) -> None:
    """Wait for something to be true."""
    deadline = time.monotonic() + within_s
    while not found():
        assert time.monotonic() < deadline, f"waited {within_s:.0f} s for {what}"
        time.sleep(1)


def text(path: Path) -> str:
    """A file's text, empty where there is none yet."""
    return path.read_text(errors="replace") if path.exists() else ""


def assert_same_bits(weights: Path, expected: Path) -> None:
    """Two runs ended in the same state dict and the same metrics, to the last bit."""
    ours, theirs = load_state_dict(weights), load_state_dict(expected)
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    metrics = [path.with_suffix(".run") / "metrics.jsonl" for path in (weights, expected)]
    assert metrics[0].read_bytes() == metrics[1].read_bytes()
