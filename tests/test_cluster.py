"""scripts/submit: our words become each scheduler's, and what cannot be meant is one line before anything is queued.

tests/golden/submit.txt holds each command and what it prints; `python tests/test_cluster.py` writes it anew.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "submit.txt"
NATIVE = sorted(
    p for p in (ROOT / "deployment").rglob("*") if p.suffix in (".sub", ".dag", ".pbs") or p.name == "train.sh"
)
COMMANDS = (
    "--cluster htcondor -- --conv_net vgg --epochs 20 --data_dir train.zip",
    "--cluster htcondor --gpu_memory_gb 16 --image docker://me/marten:1.0 -- --data_dir osdf:///chtc/staging/me/train.zip",
    "--cluster htcondor --gpus 0 --runs runs.txt --python /opt/python -- --epochs 5 --data_dir train.zip",
    "--cluster slurm --cpus 8 --time 4h -- --conv-net vgg --data_dir train.zip",
    "--cluster slurm --gpus 0 --runs runs.txt --at_once 2 --native=--account=lab -- --epochs 5 --data_dir=pets",
    "--cluster slurm --gpus 4 --nodes 2 --cpus 6 -- --conv_net vgg --batch_size 256 --data_dir train.zip",
    "--cluster slurm --gpus 0 --nodes 2 -- --conv_net vgg",
    "--cluster htcondor --gpus 2 -- --conv_net vgg",
    "--cluster pbs --gpus 2 -- --conv_net vgg",
    "--cluster local --gpus 2 -- --conv_net vgg",
    "--cluster pbs --name a_very_long_name --memory_gb 32 -- --conv_net vgg --lr 1e-3 1e-4 --data_dir train.zip",
    "--cluster pbs --runs runs.txt --time 20min -- --epochs 5",
    "--cluster local -- --conv_net vgg --data_dir train.zip",
)
IMPOSSIBLE = (
    ("--cluster slurm -- --conv_nett vgg", "unrecognized arguments: --conv_nett"),
    ("--cluster slurm -- --epochs 0", "--epochs must be at least 1"),
    ("--cluster slurm --gpus -1 -- --conv_net vgg", "--gpus must not be negative, found -1"),
    ("--cluster slurm --gpus 4 --nodes 2 -- --batch_size 6", "--batch_size 6 cannot be shared by 8 processes"),
    ("--cluster pbs --nodes 2 -- --conv_net vgg", "several machines train together under Slurm only"),
    ("--cluster slurm --cpus 0 -- --conv_net vgg", "--cpus must be at least 1"),
    ("--cluster slurm --gpus 0 --gpu_memory_gb 8 -- --conv_net vgg", "needs --gpus 1"),
    ("--cluster slurm --time soon -- --conv_net vgg", "--time takes a time such as 90s"),
    ("--cluster slurm --time 1min -- --conv_net vgg", "at least 5min"),
    ("--cluster slurm -- --data_dir nowhere.zip", "no such file or folder"),
    ("--cluster slurm --image docker://a/b -- --conv_net vgg", "--image is for HTCondor"),
    ("--cluster lsf -- --conv_net vgg", "invalid choice: 'lsf'"),
    ("--cluster htcondor -- --model_path /abs/model.pth", "for instance out/model.pth"),
    ("--cluster slurm --runs none.txt -- --conv_net vgg", "--runs none.txt: No such file"),
    ("--cluster slurm --runs same.txt -- --conv_net vgg", "give each --model_path"),
    ("--cluster pbs -- --data_dir train.zip --weights 'two words.pth'", "no word may hold a blank"),
)


def prepare(folder: Path) -> Path:
    (folder / "train.zip").touch()
    (folder / "pets").mkdir(exist_ok=True)
    (folder / "runs.txt").write_text(
        "--lr 1e-3 --model_path out/model_a.pth\n--lr 1e-4 --seed 2 --model_path out/model_b.pth\n"
    )
    (folder / "same.txt").write_text("--lr 1e-3\n--lr 1e-4\n")
    return folder


def submit(folder: Path, words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "submit"), *shlex.split(words)]
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix, **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def told(folder: Path) -> str:
    """Each command and what it prints, without what differs from machine to machine."""
    parts = []
    for words in COMMANDS:
        done = submit(folder, words.replace("--cluster", "--dry_run --cluster", 1))
        assert done.returncode == 0, done.stderr
        parts.append(f"$ scripts/submit --dry_run {words}\n{done.stdout}")
    text = "\n".join(parts).replace(sys.executable, "/python")
    return text.replace(str(folder), "/here").replace(str(ROOT), "/marten")


def test_each_scheduler_is_told_in_its_own_words(tmp_path: Path) -> None:
    assert told(prepare(tmp_path)) == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize(("words", "line"), IMPOSSIBLE, ids=[line for _, line in IMPOSSIBLE])
def test_what_cannot_be_meant_is_one_line_and_exit_2(tmp_path: Path, words: str, line: str) -> None:
    done = submit(prepare(tmp_path), words)
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(("cluster", "program"), [("htcondor", "condor_submit"), ("slurm", "sbatch"), ("pbs", "qsub")])
def test_no_scheduler_on_this_machine_is_one_line_and_exit_1(tmp_path: Path, cluster: str, program: str) -> None:
    done = submit(prepare(tmp_path), f"--cluster {cluster} -- --conv_net vgg", PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"there is no {program} on this machine" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("file", NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_native_files_hold_no_secret_and_no_blank_at_a_lines_end(file: Path) -> None:
    # B0-01, B2-17
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [i for i, line in enumerate(lines, 1) if line != line.rstrip() or line.endswith("\\")] == []
    assert not [line for line in lines if re.search(r"(?i)api_?key|password|secret|token\s*=", line)]
    directives = [line for line in lines if line.startswith(("#PBS", "#SBATCH"))]
    assert not [line for line in directives if " #" in line]


def test_b0_04_b0_19_the_checkpoint_travels_and_is_found_again() -> None:
    for name in ("train.sub", "infer.sub"):
        text = (ROOT / "deployment" / "htcondor" / name).read_text(encoding="utf-8")
        said = dict(re.findall(r"^(\w+)\s*=\s*(.*)$", text, re.MULTILINE))
        assert said["checkpoint_exit_code"] == "85"
        assert said["preserve_relative_paths"] == "true"
        assert said["when_to_transfer_output"] == "ON_EXIT"
        assert said["transfer_checkpoint_files"] == said["transfer_output_files"] == "$(folder)"  # no slash at its end


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        GOLDEN.write_text(told(prepare(Path(name))), encoding="utf-8")
