"""A real Slurm runs one training in two tasks on two nodes: as one process would have, stopped and resumed as well."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from marten.files import ROOT
from modelspec import ModelCard
from tests.schedulers import FLAGS, assert_same_bits, command, prepare, slurm, submit, text, uninterrupted, until
from tests.test_distributed import assert_near

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def running_slurm() -> None:
    slurm()


def output(folder: Path) -> str:
    return "".join(text(path) for path in sorted(folder.glob("marten-*.out")))


def ended(folder: Path, job: str) -> bool:
    """Whether it is done; a job that was put back starts at once, where Slurm would let it wait for two minutes."""
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], cwd=folder, capture_output=True)
    return "End of training" in output(folder)


def test_two_tasks_under_srun_equal_one_process_within_rounding(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "submit")
    length = ("--epochs", "2")
    job = submit("slurm", folder, "--nodes", "2", flags=(*length, "--model_path", "out/model_d.pth"))
    until(lambda: ended(folder, job), 300, "the end of training")
    alone = uninterrupted(tmp_path / "here", *length)
    assert_near(folder / "out/model_d.pth", alone)
    card, expected = (ModelCard.read(path.with_suffix(".json")) for path in (folder / "out/model_d.pth", alone))
    assert card.metrics["validation_accuracy"] == expected.metrics["validation_accuracy"]
    rows = [json.loads(line) for line in text(folder / "out/model_d.run/metrics.jsonl").splitlines()]
    assert [(row["train_count"], row["validation_count"]) for row in rows] == [(18, 6), (18, 6)]
    told = output(folder)
    assert "2 tasks on 2 nodes" in told
    assert told.count("Epoch 1/2 | ") == 1  # one voice
    # each node unpacked the archive on a disk of its own
    assert told.count("n1/job") > 0
    assert told.count("n2/job") > 0


def test_a_signal_to_the_job_saves_both_tasks_and_it_ends_in_the_bits_of_one_that_was_not_stopped(
    tmp_path: Path,
) -> None:
    folder = prepare(tmp_path / "submit")
    length = ("--epochs", "24")
    job = submit("slurm", folder, "--nodes", "2", flags=(*length, "--model_path", "out/model_s.pth"))
    until((folder / "out/model_s.run/metrics.jsonl").exists, 200, "the first epoch")
    command("scancel", "--batch", "--signal=USR1", job, folder=folder)
    until(lambda: "to run job" in output(folder), 100, "the request to be run again")
    until(lambda: ended(folder, job), 400, "the end of training")
    assert "Stopped by SIGUSR1" in output(folder)
    assert "Resuming from out/model_s.run/checkpoint.pt" in output(folder)

    there = prepare(tmp_path / "here")
    local = (sys.executable, str(ROOT / "scripts" / "submit"), "--cluster", "local", "--gpus", "2")
    words = (*FLAGS, *length, "--model_path", "out/model_l.pth")
    command(*local, "--python", sys.executable, "--", *words, folder=there)
    assert_same_bits(folder / "out/model_s.pth", there / "out/model_l.pth")
