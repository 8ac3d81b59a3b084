"""The jobs for scenes and scores: their words reach the trainer, and no secret reaches a log or the scheduler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from marten.files import ROOT

PBS = ROOT / "deployment" / "pbs"
KEY = "k3y-that-nobody-may-see"
PROGRAM = f"""
import os, sys
print("words", *sys.argv[1:], flush=True)
print("key is", "known" if os.environ.get("WANDB_API_KEY") == "{KEY}" else "unknown")
sys.exit(int(os.environ["CODE"]))
"""
QSUB = '#!/usr/bin/env bash\necho "$@" >>"$0.log"\nenv >>"$0.log"\necho 18.server\n'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A repository whose trainer tells its words, a folder of secrets, and a qsub that notes all it is given."""
    home = tmp_path / "home"
    (home / "deep_cnn").mkdir(parents=True)
    (home / "train_main.py").touch()
    (home / "deployment").symlink_to(ROOT / "deployment")
    for name in ("scripts", "marten", "modelspec.py"):
        (home / name).symlink_to(ROOT / name)
    (home / "deep_cnn" / "__main__.py").write_text(PROGRAM)
    secrets = tmp_path / ".marten-keys"
    secrets.mkdir(mode=0o700)
    (secrets / "WANDB_API_KEY").write_text(KEY + "\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qsub").write_text(QSUB)
    (tmp_path / "bin" / "qsub").chmod(0o755)
    return tmp_path


def job(place: Path, name: str, **changes: str) -> subprocess.CompletedProcess[str]:
    scheduled = ("SLURM", "PBS", "_CONDOR", "MARTEN", "OMP", "TMPDIR", "WANDB")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(scheduled)}
    own = {"HOME": str(place), "MARTEN_HOME": str(place / "home"), "MARTEN_PYTHON": sys.executable, "CODE": "0"}
    path = f"{place / 'bin'}:{clean['PATH']}"
    return subprocess.run(
        ["bash", PBS / name],
        cwd=place,
        env={**clean, **own, "PATH": path, "PBS_JOBID": "17.server", **changes},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize(
    ("name", "told", "words"),
    [
        (
            "scenes.pbs",
            {"data": "places", "more": "--wandb True"},
            "--epochs 50 --batch_size 156 --lr 1e-3 --wandb True",
        ),
        ("scores.pbs", {"data": "images", "study": "5f"}, "--data_dir images --metadata input/meta --study_id 5f"),
    ],
)
def test_b2_17_the_key_reaches_the_trainer_and_nothing_else(
    place: Path, name: str, told: dict[str, str], words: str
) -> None:
    done = job(place, name, CODE="85", **told)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
    assert "--max_runtime 23h45min" in done.stdout
    assert "key is known" in done.stdout
    assert "goes on as job 18.server" in done.stderr
    noted = (place / "bin" / "qsub.log").read_text()
    assert noted.startswith(f"-V {place / 'home'}/deployment/pbs/{name}\n")
    assert f"data={told['data']}\n" in noted  # what the next job needs is handed on, but for the key
    assert KEY not in noted + done.stdout + done.stderr
    assert "\nWANDB_API_KEY=" not in noted


def test_a_folder_that_others_may_enter_is_refused(place: Path) -> None:
    (place / ".marten-keys").chmod(0o750)
    done = job(place, "scenes.pbs")
    assert done.returncode == 2
    assert "chmod 700" in done.stderr
    assert "words" not in done.stdout


def test_without_secrets_it_runs_all_the_same(place: Path) -> None:
    done = job(place, "scores.pbs", HOME=str(place / "home"))
    assert done.returncode == 0, done.stderr
    assert "key is unknown" in done.stdout
