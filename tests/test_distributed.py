"""Several processes train as one: equal shares, the same result, one voice, and a stop of one that stops all."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from marten.checkpoint import load_checkpoint
from marten.datasets import PictureSet, Sample
from marten.distributed import World, find_world, moved
from marten.errors import CHECKPOINTED, DONE, UsageError
from marten.files import ROOT
from marten.readiness import free_ports
from modelspec import ModelCard, load_state_dict
from tests.runs import QUICK, result, run_once

TOLERANCE = 2e-4
"""Of weights, whose rates are 1e-3: Adam turns the rounding of a gradient near 0 into a part of a whole step."""


def test_torchrun_and_srun_say_who_we_are() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert find_world(torchrun) == World(3, 4, 1, 2)
    step = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    assert find_world({**step, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}) == World(4, 5, 0, 1, own_cpus=True)
    assert find_world({**step, "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}).local_size == 2
    # the batch script of a job of several tasks is one process
    assert find_world({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == World()
    with pytest.raises(UsageError, match="SLURM_PROCID"):
        find_world({"SLURM_STEP_NUM_TASKS": "2"})


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 17])
def test_shares_are_the_batch_each_picture_once_or_all_of_it(size: int, count: int) -> None:
    batch = list(range(count))
    shares = [World(rank, size).share(batch) for rank in range(size)]
    if count < size:
        assert shares == [batch] * size
    else:
        assert sorted(i for share in shares for i in share) == batch
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_pictures_that_another_machine_staged_elsewhere_are_found_here() -> None:
    there, here = Path("/scratch/n1/job7/pets"), Path("/scratch/n2/job7/pets")
    samples = (Sample("train/cat.0.jpg", there / "train" / "cat.0.jpg", 0), Sample("x", Path("/shared/x.jpg"), 1))
    found = moved(PictureSet(there / "train", "flat", ("cat", "dog"), samples), there, here)
    assert found.root == here / "train"
    assert [s.path for s in found.samples] == [here / "train" / "cat.0.jpg", Path("/shared/x.jpg")]
    table = PictureSet(there / "t.csv", "table", (), (Sample("a.jpg", there / "a.jpg", 0),))
    assert moved(table, there / "t.csv", here / "t.csv").samples[0].path == here / "a.jpg"


def test_a_batch_that_cannot_be_shared_is_refused(drawn_set: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--batch_size 4 cannot be shared by 5 processes"):
        run_once(drawn_set, tmp_path, world=World(0, 5))


def processes(*words: object, count: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Run tests/ranks.py in several processes that meet at a free port, and wait for all."""
    base = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "WORLD_SIZE": str(count)}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "LOCAL_WORLD_SIZE": str(count)}
    command = [sys.executable, str(ROOT / "tests" / "ranks.py"), *map(str, words)]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env={**base, **rank}, **pipes) for rank in ranks]
    ended = []
    try:
        for process in started:
            out, err = process.communicate(timeout=240)
            ended.append(subprocess.CompletedProcess(command, process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return ended


LEAVING = """
import atexit, threading, time
from marten.cli import Parser, run
atexit.register(print, "tidied up")
threading.Thread(target=time.sleep, args=(120,)).start()
run(lambda args: print("trained") or 85, Parser(prog="leaving"))
"""


def test_one_of_several_leaves_with_its_own_code_whatever_threads_it_still_has() -> None:
    environment = {**os.environ, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", LEAVING]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (CHECKPOINTED, "trained\ntidied up\n", "")


def test_layers_that_share_a_batch_compute_what_one_would() -> None:
    ended = processes("layers")
    assert [(p.returncode, p.stdout) for p in ended] == [(0, "equal\n")] * 2, ended


@pytest.fixture(scope="module")
def two(drawn_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run by two processes, which torchrun started and nobody stopped."""
    out = tmp_path_factory.mktemp("two")
    names = {"conv_net", "batch_size", "epochs", "validation_split", "num_workers", "augment", "dropout", "ema"}
    flags = [word for name in sorted(names) for word in (f"--{name}", str(QUICK[name]))]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train_main.py")]
    place = ["--data_dir", str(drawn_set), "--model_path", str(out / "model.pth"), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words, *flags, *place, "--precision", "fp32"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == DONE, done.stderr
    assert done.stderr == ""
    (out / "told").write_text(done.stdout)
    return out


def assert_near(weights: Path, expected: Path) -> None:
    ours, theirs = load_state_dict(weights), load_state_dict(expected)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_equal_one_within_rounding_and_count_each_picture_once(two: Path, whole_run: Path) -> None:
    assert_near(two / "model.pth", whole_run / "model.pth")
    ours, theirs = ModelCard.read(two / "model.json"), ModelCard.read(whole_run / "model.json")
    assert ours.metrics["validation_accuracy"] == theirs.metrics["validation_accuracy"]
    assert ours.metrics["validation_loss"]["count"] == 6
    assert ours.metrics["validation_loss"]["value"] == pytest.approx(theirs.metrics["validation_loss"]["value"], 1e-3)
    assert (two / "model.run" / "split.csv").read_bytes() == (whole_run / "model.run" / "split.csv").read_bytes()


def test_one_voice_speaks_for_all(two: Path) -> None:
    told = (two / "told").read_text()
    assert "2 processes, each with 2 pictures of every batch of 4\n" in told
    lines = told.splitlines()
    assert len(lines) == len(set(lines)), told
    assert not (two / "model.run" / "lock").exists()


def test_a_stop_of_the_last_process_stops_all_and_the_run_ends_in_the_same_bits(
    two: Path, whole_run: Path, drawn_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ended = processes("run", drawn_set, out, 3)
    assert [p.returncode for p in ended] == [CHECKPOINTED, CHECKPOINTED], ended
    assert "Stopped by SIGTERM in epoch 1, batch 3" in ended[0].stdout
    assert ended[1].stdout == ""
    found = load_checkpoint(out / "model.run" / "checkpoint.pt")
    assert found is not None
    assert found[0]["running"]["count"] == 12
    alone = tmp_path / "alone"
    shutil.copytree(out, alone)

    ended = processes("run", drawn_set, out, 0)
    assert [p.returncode for p in ended] == [DONE, DONE], ended
    assert "Resuming from" in ended[0].stdout
    assert result(out) == result(two)

    # by one process it goes on as well, and says what cannot be the same
    assert run_once(drawn_set, alone) == DONE
    assert "was written by 2 processes, and now there are 1: the same pictures" in capsys.readouterr().out
    assert_near(alone / "model.pth", whole_run / "model.pth")


def test_a_picture_that_one_process_cannot_read_stops_all_with_the_state_saved(drawn_set: Path, tmp_path: Path) -> None:
    first, last = processes("lose", drawn_set, tmp_path)
    assert (first.returncode, last.returncode) == (1, 1)
    assert "another process could not get its pictures. The state is saved" in first.stderr
    assert "the fifth is gone. The state is saved: the same command goes on" in last.stderr
    found = load_checkpoint(tmp_path / "model.run" / "checkpoint.pt")
    assert found is not None
    assert found[0]["batch"] == 2  # each reads two pictures of a batch


JOB_PROGRAM = """
import os, signal, sys, time
rank = int(os.environ["RANK"])

def say(*words):  # a line at once: those of two processes must not run into each other
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

say("rank", rank, *sys.argv[1:], "threads", os.environ["OMP_NUM_THREADS"])
if "wait" in sys.argv:
    asked = []
    signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    say("waiting")
    ended = time.monotonic() + 120  # whatever becomes of those who would ask
    while not asked and time.monotonic() < ended:
        time.sleep(0.05)
    if rank == 0:
        open(os.environ["MARTEN_EXIT"], "w").write("85")
sys.exit(3 if "fail" in sys.argv else 0)
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start job.sh with two processes of a program that stands in for training; what still runs is ended."""
    (tmp_path / "train_main.py").write_text(JOB_PROGRAM)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PBS", "_CONDOR"))}
    told = {"MARTEN_HOME": str(tmp_path), "MARTEN_PYTHON": sys.executable, "MARTEN_PROCESSES": "2", "NCPUS": "6"}
    clean.pop("OMP_NUM_THREADS", None)

    def start(*words: str) -> subprocess.Popen[str]:
        command = ["bash", str(ROOT / "deployment" / "job.sh"), *words]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        begun.append(subprocess.Popen(command, cwd=tmp_path, env={**clean, **told}, start_new_session=True, **pipes))
        return begun[-1]

    begun: list[subprocess.Popen[str]] = []
    yield start
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # torchrun hands it on to sessions of their own
        process.communicate(timeout=150)


def test_a_job_of_two_processes_hands_signals_on_and_asks_to_be_run_again(
    job: Callable[..., subprocess.Popen[str]],
) -> None:
    # torchrun ends with 1 whatever its processes say, so an asked-for restart would have looked like a failure
    running = job("wait")
    assert running.stdout is not None
    said = [running.stdout.readline() for _ in range(4)]
    assert sorted(said)[:2] == ["rank 0 wait threads 3\n", "rank 1 wait threads 3\n"]
    running.send_signal(signal.SIGUSR1)
    _, told = running.communicate(timeout=60)
    assert running.returncode == CHECKPOINTED, told
    assert "SignalException" not in told  # past torchrun, which would leave them 30 s


def test_a_job_of_two_processes_that_fails_says_so(job: Callable[..., subprocess.Popen[str]]) -> None:
    running = job("fail")
    running.communicate(timeout=60)
    assert running.returncode == 1
