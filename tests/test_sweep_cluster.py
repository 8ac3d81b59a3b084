"""Optuna in several jobs of a real Slurm: one journal, runs of their own, and the best of them as one archive."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from marten.files import ROOT
from tests.schedulers import TRAINING, command, prepare, slurm, text, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_jobs_of_an_array_share_one_study(tmp_path: Path) -> None:
    slurm()
    folder = prepare(tmp_path / "submit")
    train = str(ROOT / "deployment" / "slurm" / "train.sh")
    array = ("sbatch", "--array=1-2", "--gres=none", "--cpus-per-task=1", "--mem=1G", train)
    words = ("run", "--vary", "lr=1e-4..1e-2:log", "--optuna", "2", "--folder", "out", "--python", sys.executable)
    told = {"MARTEN_PROGRAM": "scripts/sweep", "MARTEN_HOME": str(ROOT), "MARTEN_PYTHON": sys.executable}
    command(*array, *words, "--", *TRAINING.split(), "--epochs", "1", folder=folder, **told)

    def outputs() -> str:
        return "".join(text(path) for path in sorted(folder.glob("marten-*.out")))

    until(lambda: outputs().count("scripts/sweep exited") == 2, 400, "the end of both jobs")
    assert outputs().count("scripts/sweep exited 0") == 2, outputs()
    sweep = (sys.executable, str(ROOT / "scripts" / "sweep"))
    command(*sweep, "table", "--folder", "out", folder=folder)
    with open(folder / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["finished"] for row in rows] == ["yes"] * 4
    assert len({row["lr"] for row in rows}) == 4, "the jobs drew the same"
    joined = command(*sweep, "ensemble", "--folder", "out", "--best", "2", folder=folder).strip()
    archive = (sys.executable, str(ROOT / "scripts" / "archive"), "--model_path", joined)
    assert "answers as its state dict does" in command(*archive, "--export_path", "store", folder=folder)
    assert (folder / "store" / "ensemble.mar").exists()
