"""deployment/job.sh, the worker-side wrapper: words, data, signals, and exit 85 in each scheduler's own way."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from marten.files import ROOT

JOB = ROOT / "deployment" / "job.sh"
PROGRAM = """
import os, signal, sys, time
print("words", *sys.argv[1:], "threads", os.environ["OMP_NUM_THREADS"], flush=True)
if "--data_dir" in sys.argv:
    print("pictures", *sorted(os.listdir(sys.argv[sys.argv.index("--data_dir") + 1])))
def stop(number, frame):
    print("stopped by", signal.Signals(number).name, flush=True)
    time.sleep(0.3)
    sys.exit(85)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
if "wait" in sys.argv:
    print("waiting", flush=True)
    time.sleep(60)
if "die" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("scripts", "marten", "modelspec.py"):
        (home / name).symlink_to(ROOT / name)
    (home / "train_main.py").write_text(PROGRAM)
    (tmp_path / "sandbox").mkdir()
    return tmp_path


def environment(place: Path, **changes: str) -> dict[str, str]:
    scheduled = ("SLURM", "PBS", "_CONDOR", "MARTEN", "OMP", "TMPDIR")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(scheduled)}
    clean["PATH"] = f"{place / 'bin'}:{clean['PATH']}"
    return {**clean, "MARTEN_HOME": str(place / "home"), "MARTEN_PYTHON": sys.executable, **changes}


def job(place: Path, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", JOB, *words],
        cwd=place / "sandbox",
        env=environment(place, **changes),
        capture_output=True,
        text=True,
        timeout=60,
    )


@contextlib.contextmanager
def waiting_job(place: Path, **changes: str) -> Iterator[subprocess.Popen[str]]:
    """A job whose program has installed its handlers and waits for a signal."""
    words, env = ["bash", JOB, "wait"], environment(place, **changes)
    with subprocess.Popen(words, cwd=place / "sandbox", env=env, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        while running.stdout.readline() != "waiting\n":
            pass
        yield running


def stand_in(place: Path, name: str, text: str) -> Path:
    """A scheduler's command that does `text` and notes its words; returns the file of notes."""
    folder = place / "bin"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/usr/bin/env bash\necho "$@" >> {place}/{name}.log\n{text}\n')
    (folder / name).chmod(0o755)
    return place / f"{name}.log"


def test_b0_02_words_reach_the_program_whole_and_its_code_comes_back(place: Path) -> None:
    done = job(place, "--conv_net", "vgg", "--name", "two words", OMP_NUM_THREADS="3")
    assert done.returncode == 0
    assert done.stdout == "words --conv_net vgg --name two words threads 3\n"
    assert [job(place, CODE=code).returncode for code in ("1", "2", "85")] == [1, 2, 85]
    assert job(place, "die").returncode == 137


def test_threads_are_those_the_scheduler_granted(place: Path) -> None:
    assert "threads 5" in job(place, SLURM_CPUS_PER_TASK="5").stdout


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_b3_11_signals_to_the_shell_reach_the_program(place: Path, name: str) -> None:
    with waiting_job(place) as running:
        running.send_signal(signal.Signals[name])
        time.sleep(0.1)
        running.send_signal(signal.Signals[name])
        assert running.stdout is not None
        assert f"stopped by {name}" in running.stdout.read()
        assert running.wait(20) == 85


def test_b0_05_a_dirty_sandbox_is_taken_as_it_is(place: Path) -> None:
    sandbox = place / "sandbox"
    with zipfile.ZipFile(sandbox / "train.zip", "w") as archive:
        for name in ("cat.0.jpg", "dog.0.jpg"):
            archive.writestr(f"train/{name}", name)
    words = {"MARTEN_INPUT": "train.zip", "_CONDOR_SCRATCH_DIR": str(sandbox), "MARTEN_OUT": "out"}
    first = job(place, CODE="85", **words)
    again = job(place, **words)
    assert (first.returncode, again.returncode) == (85, 0)
    assert first.stdout.splitlines()[1] == again.stdout.splitlines()[1] == "pictures train"
    assert "staged in" in first.stderr
    assert "was here already" in again.stderr
    assert (sandbox / "out").is_dir()
    # a first try that died in the middle: no marker, one file half written
    (sandbox / "train.staged.json").unlink()
    (sandbox / "train" / "train" / "cat.0.jpg").write_text("c")
    assert job(place, **words).returncode == 0
    assert (sandbox / "train" / "train" / "cat.0.jpg").read_text() == "cat.0.jpg"


def test_missing_data_ends_the_job_before_the_program(place: Path) -> None:
    done = job(place, MARTEN_INPUT="nowhere.zip")
    assert done.returncode == 1
    assert "nothing to stage" in done.stderr
    assert done.stdout == ""


def test_flags_for_staging_are_heeded_and_a_folder_is_staged_by_them(place: Path) -> None:
    (place / "pets").mkdir()
    (place / "pets" / "cat.0.jpg").write_text("cat")
    (place / "node").mkdir()
    told = {
        "MARTEN_INPUT": str(place / "pets"),
        "MARTEN_STAGE": "--link --workers 2",
        "SLURM_TMPDIR": str(place / "node"),
    }
    done = job(place, **told)
    assert done.returncode == 0, done.stderr
    assert f"--data_dir {place / 'node' / 'pets'}" in done.stdout
    assert (place / "node" / "pets").readlink() == place / "pets"


def test_an_archive_cut_short_ends_the_job_before_the_program(place: Path) -> None:
    with zipfile.ZipFile(place / "sandbox" / "train.zip", "w") as archive:
        archive.writestr("train/cat.0.jpg", "cat" * 1000)
    whole = (place / "sandbox" / "train.zip").read_bytes()
    (place / "sandbox" / "train.zip").write_bytes(whole[:-40])
    done = job(place, MARTEN_INPUT="train.zip")
    assert (done.returncode, done.stdout) == (1, "")
    assert "train.zip is no readable archive: it is damaged, cut short" in done.stderr
    assert not (place / "sandbox" / "train").exists()


def test_an_array_takes_its_line_of_the_runs(place: Path) -> None:
    (place / "sandbox" / "runs.txt").write_text("--lr 1e-3\n--lr 1e-4 --seed 2\n")
    runs = {"MARTEN_RUNS": "runs.txt", "OMP_NUM_THREADS": "1"}
    assert job(place, "-e", "3", SLURM_ARRAY_TASK_ID="2", **runs).stdout == "words -e 3 --lr 1e-4 --seed 2 threads 1\n"
    assert "has no line 3" in job(place, PBS_ARRAY_INDEX="3", **runs).stderr
    assert job(place, **runs).returncode == 2


def test_slurm_is_asked_to_requeue(place: Path) -> None:
    # as Slurm does, the stand-in takes the job down
    log = stand_in(place, "scontrol", "kill -KILL $PPID")
    assert job(place, CODE="85", SLURM_JOB_ID="17").returncode == -signal.SIGKILL
    assert log.read_text() == "requeue 17\n"
    assert job(place, CODE="85", SLURM_JOB_ID="17", SLURM_RESTART_COUNT="500").returncode == 1
    stand_in(place, "scontrol", "exit 1")
    refused = job(place, CODE="85", SLURM_JOB_ID="17")
    assert refused.returncode == 85
    assert "by hand" in refused.stderr


def test_a_cancelled_job_does_not_put_itself_back(place: Path) -> None:
    log = stand_in(place, "scontrol", "exit 0")
    with waiting_job(place, SLURM_JOB_ID="17") as running:
        running.terminate()
        assert running.wait(20) == 85
    assert not log.exists()


def test_pbs_is_sent_the_job_again(place: Path) -> None:
    log = stand_in(place, "qsub", 'echo "$MARTEN_RESTARTS" >> "$0.count"; echo 18.server')
    again = {"PBS_JOBID": "17.server", "MARTEN_RESUBMIT": "qsub -l walltime=1:00:00 train.pbs"}
    done = job(place, CODE="85", **again)
    assert done.returncode == 0
    assert "goes on as job 18.server" in done.stderr
    assert job(place, CODE="85", MARTEN_RESTARTS="4", **again).returncode == 0
    assert log.read_text() == "-l walltime=1:00:00 train.pbs\n" * 2
    assert (place / "bin" / "qsub.count").read_text() == "1\n5\n"
    assert job(place, CODE="85", MARTEN_RESTARTS="500", **again).returncode == 1
    assert job(place, CODE="85", PBS_JOBID="17.server").returncode == 85


def test_a_machine_without_the_program_or_the_interpreter_says_so(place: Path) -> None:
    lost = job(place, MARTEN_HOME="/nowhere", MARTEN_PROGRAM="other_main.py")
    assert (lost.returncode, lost.stdout) == (2, "")
    assert "set MARTEN_HOME" in lost.stderr
    assert "set MARTEN_PYTHON" in job(place, MARTEN_PYTHON="python9").stderr


def test_a_signal_before_the_program_heeds_signals_asks_to_be_run_again(place: Path) -> None:
    # on a slow disk importing torch took longer than a job had before its time limit's signal, and the run was lost
    program = "import time\nprint('waiting', flush=True)\ntime.sleep(60)\n"
    (place / "home" / "train_main.py").write_text(program)
    log = stand_in(place, "scontrol", "kill -9 $PPID")
    with waiting_job(place, SLURM_JOB_ID="7") as running:
        running.send_signal(signal.SIGUSR1)
        running.wait(30)
    assert log.read_text() == "requeue 7\n"
