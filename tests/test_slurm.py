"""A real Slurm runs, signals, requeues and resumes trainings, an array of them, and PBS jobs through its own qsub."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from marten.files import ROOT
from tests.schedulers import TRAINING, assert_same_bits, command, prepare, slurm, submit, text, uninterrupted, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def running_slurm() -> None:
    slurm()


def now(folder: Path, job: str) -> None:
    """Slurm lets a requeued job wait for two minutes; not here."""
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], cwd=folder, capture_output=True)


def output(folder: Path) -> str:
    return "".join(text(path) for path in sorted(folder.glob("marten-*.out")))


def test_an_array_requeues_itself_at_a_signal_and_ends_in_the_same_bits(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "submit")
    length = ("--epochs", "60")
    (folder / "runs.txt").write_text("--model_path out/model_a.pth\n--seed 1 --model_path out/model_b.pth --epochs 2\n")
    job = submit("slurm", folder, "--runs", "runs.txt", "--time", "10min", flags=length)
    until((folder / "out/model_a.run/metrics.jsonl").exists, 200, "the first epoch")
    command("scancel", "--batch", "--signal=USR1", f"{job}_1", folder=folder)
    until(lambda: "to run job" in output(folder), 100, "the request to be run again")

    def ended() -> bool:
        now(folder, f"{job}_1")
        return output(folder).count("End of training") == 2

    until(ended, 300, "the end of both")
    assert "Stopped by SIGUSR1" in output(folder)
    assert "Resuming from out/model_a.run/checkpoint.pt" in output(folder)
    assert_same_bits(folder / "out/model_a.pth", uninterrupted(tmp_path / "here", *length))
    assert_same_bits(
        folder / "out/model_b.pth", uninterrupted(tmp_path / "there", *length, "--seed", "1", "--epochs", "2")
    )


def test_b3_11_a_run_through_several_time_limits_ends_in_the_same_bits(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "submit")
    length = ("--epochs", "300")
    job = submit(
        "slurm",
        folder,
        "--native=--time=2 --signal=B:USR1@60",
        flags=(*length, "--model_path", "out/model_t.pth"),
    )
    until(lambda: "to run job" in output(folder), 180, "the signal before the limit")
    assert "got SIGUSR1" in output(folder)
    assert re.search(r"Stopped by SIGUSR1 in epoch \d+", output(folder))

    def ended() -> bool:
        now(folder, job)
        return "End of training" in output(folder)

    until(ended, 900, "the end of training, a few minutes at a time")
    assert "Resuming from out/model_t.run/checkpoint.pt" in output(folder)
    assert_same_bits(folder / "out/model_t.pth", uninterrupted(tmp_path / "here", *length))


def test_a_cancelled_job_has_saved_its_state_and_stays_cancelled(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "submit")
    length = ("--epochs", "2000", "--model_path", "out/model_c.pth")
    job = submit("slurm", folder, "--time", "10min", flags=length)
    until((folder / "out/model_c.run/metrics.jsonl").exists, 200, "the first epoch")
    command("scancel", job, folder=folder)
    until(lambda: "ended by SIGTERM with its state saved" in output(folder), 60, "the end of a cancelled job")
    until(lambda: "JobState=CANCELLED" in command("scontrol", "show", "job", job, folder=folder), 60, "the cancelling")
    assert (folder / "out/model_c.run/checkpoint.pt").exists()


def test_a_job_that_slurm_cannot_run_is_refused_with_its_own_words(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "scripts" / "submit"), "--cluster", "slurm", "--cpus", "400", "--gpus", "0"]
    done = subprocess.run(
        [*words, "--", "--conv_net", "vgg"], cwd=prepare(tmp_path / "submit"), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "node configuration is not available" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_pbs_job_submits_itself_again_until_it_is_done(tmp_path: Path) -> None:
    """Through Slurm's qsub, which knows little of PBS: evidence for the file's flow, none for its resource words."""
    folder = prepare(tmp_path / "submit")
    page = (ROOT / "deployment" / "pbs" / "train.pbs").read_text()
    page = re.sub(r"^#PBS -l select.*$", "#PBS -l select=1:ncpus=1:mem=1gb", page, flags=re.MULTILINE)
    script = folder / "mine.pbs"
    script.write_text(page)
    told = {"script": str(script), "MARTEN_HOME": str(ROOT), "MARTEN_PYTHON": sys.executable}
    flags = TRAINING.replace("--data_dir train.zip", "--epochs 60 --model_path out/model_p.pth")
    command("qsub", "-V", str(script), folder=folder, flags=flags, data="train.zip", max_runtime="9s", **told)

    def words() -> str:
        return "".join(text(path) for path in sorted(folder.glob("*.[oe]*[0-9]")))

    until(lambda: "End of training" in words(), 300, "the end of the chain of jobs")
    assert "goes on as job" in words()
    assert "Resuming from out/model_p.run/checkpoint.pt" in words()
    assert_same_bits(folder / "out/model_p.pth", uninterrupted(tmp_path / "here", "--epochs", "60"))
