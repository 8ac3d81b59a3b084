"""A real HTCondor pool runs, stops, moves and resumes a training; it ends in the bits of the uninterrupted one."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest

from marten.files import ROOT
from tests.schedulers import (
    TRAINING,
    assert_same_bits,
    command,
    condor,
    prepare,
    submit,
    text,
    uninterrupted,
    until,
)

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def pool() -> str:
    return str(condor())


def finished(folder: Path) -> bool:
    return "005 (" in text(folder / "marten.log")


def test_it_exits_85_twice_and_then_0(pool: str, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "submit")
    submit("htcondor", folder, flags=("--epochs", "3", "--checkpoint_every", "1", "--self_checkpoint"), path=pool)
    until(lambda: finished(folder), 200, "the job's end")
    (errors,) = folder.glob("*.err")
    assert re.findall(r"exited (\d+)", text(errors)) == ["85", "85", "0"]
    assert_same_bits(folder / "out/model_cat_dog_conv_net.pth", uninterrupted(tmp_path / "here", "--epochs", "3"))


def test_b0_04_an_evicted_job_goes_on_in_a_fresh_sandbox(pool: str, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "submit")
    length = ("--epochs", "60")
    job = submit("htcondor", folder, flags=(*length, "--checkpoint_every", "20", "--self_checkpoint"), path=pool)
    log = folder / "marten.log"
    until(lambda: text(log).count("Finished transferring output files") == 1, 200, "the first checkpoint")
    command("condor_vacate_job", job, folder=folder, path=pool)
    until(lambda: "004 (" in text(log), 60, "the eviction")
    until(lambda: finished(folder), 300, "the job's end")
    (output,) = folder.glob("*.out")
    (errors,) = folder.glob("*.err")
    sandboxes = set(re.findall(r"(/\S+/dir_\d+), htcondor", text(errors)))
    assert "Resuming from out/model_cat_dog_conv_net.run/checkpoint.pt: epoch 21" in text(output)
    assert len(sandboxes) == 2, text(errors)
    assert_same_bits(folder / "out/model_cat_dog_conv_net.pth", uninterrupted(tmp_path / "here", *length))


def test_a_sweep_as_a_dag_loses_a_node_and_is_rescued(pool: str, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "submit")
    page = (ROOT / "deployment/htcondor/sweep.dag").read_text()
    page = re.sub(r"^(JOB|VARS) (flip|none) .*\n", "", page, flags=re.MULTILINE).replace("lr3 lr4 flip none", "lr3 lr4")
    page = re.sub(r"^RETRY.*$", "", page, flags=re.MULTILINE).replace("/home/me/marten", str(ROOT))
    small = f'python="{sys.executable}" gpus="0" cpus="1" memory="1GB" disk="1GB"'
    page = re.sub(r"^VARS ALL_NODES.*$", f'VARS ALL_NODES data="{folder}/train.zip" {small}', page, flags=re.MULTILINE)
    training = TRAINING.replace(" --data_dir train.zip", " --epochs 3")
    page = page.replace("--conv_net base_cnn --lr 1e-3", f"{training} --lr 1e-3")
    page = page.replace("--conv_net base_cnn --lr 1e-4", f"{training} --lr 1e-4 --epochs $(length)")
    page += f"JOB join {ROOT}/deployment/htcondor/collect.sub\n"
    page += 'VARS join verb="ensemble" best="2"\nPARENT table CHILD join\n'
    (folder / "sweep.dag").write_text(page + 'VARS lr4 length="2000"\n')
    (folder / "out").mkdir()
    runs = (f"--lr 1e-{3 + i} --model_path out/model_{i + 1}.pth\n" for i in (0, 1))
    (folder / "out" / "runs.txt").write_text("".join(runs))
    for path in (folder, folder / "out"):
        path.chmod(0o777)
    log = folder / "sweep.dag.dagman.out"

    command("condor_submit_dag", "sweep.dag", folder=folder, path=pool)
    until(lambda: text(folder / "marten.log").count("\n001 (") == 2, 100, "both to start")
    until((folder / "out/model_1.pth").exists, 200, "the short run")
    long = command("condor_q", "-constraint", 'DAGNodeName == "lr4"', "-af", "ClusterId", folder=folder, path=pool)
    command("condor_rm", long.strip(), folder=folder, path=pool)
    until(lambda: "EXITING WITH STATUS 1" in text(log), 300, "the DAG's failure")
    assert (folder / "sweep.dag.rescue001").exists()
    assert not (folder / "out/results.csv").exists()

    (folder / "sweep.dag").write_text(page + 'VARS lr4 length="2"\n')
    command("condor_submit_dag", "sweep.dag", folder=folder, path=pool)
    until(lambda: "EXITING WITH STATUS 0" in text(log), 900, "the rescued DAG's end")
    assert len(list(folder.glob("1.*.out"))) == 1, "the run that had ended was run again"
    with open(folder / "out/results.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert {name: (row["lr"], row["epochs"], row["finished"]) for name, row in rows.items()} == {
        "1": ("1e-3", "3", "yes"),
        "2": ("1e-4", "2", "yes"),
    }
    assert (folder / "out/best.mar").stat().st_size > 1e6
    assert (folder / "out/ensemble.mar").stat().st_size > 1.9 * (folder / "out/best.mar").stat().st_size
    assert_same_bits(folder / "out/model_1.pth", uninterrupted(tmp_path / "here", "--epochs", "3", "--lr", "1e-3"))


def test_pictures_are_answered_in_shards_and_merged(pool: str, tmp_path: Path) -> None:
    weights = uninterrupted(tmp_path / "here", "--epochs", "1")
    folder = prepare(tmp_path / "submit")
    words = (f"model={weights}", f"data={folder}/train.zip", "shards=3", f"python={sys.executable}", "cpus=1")
    sub = str(ROOT / "deployment/htcondor/infer.sub")
    command("condor_submit", *words, "memory=1GB", "disk=1GB", sub, folder=folder, path=pool)
    until(lambda: text(folder / "marten.log").count("005 (") == 3, 200, "three shards")
    parts = sorted(map(str, (folder / "out").glob("dog_probs-*-of-3.csv")))
    assert len(parts) == 3, "".join(map(text, folder.glob("*.err")))
    infer = (sys.executable, str(ROOT / "scripts/infer"))
    command(*infer, "--merge", *parts, "--output", "dog_probs.csv", folder=folder)
    command(*infer, "train.zip", "--model_path", str(weights), "--output", "whole.csv", folder=folder)
    with open(folder / "dog_probs.csv") as ours, open(folder / "whole.csv") as theirs:
        for a, b in zip(csv.reader(ours), csv.reader(theirs), strict=True):
            assert a[0] == b[0]
            assert a[1] == b[1] or float(a[1]) == pytest.approx(float(b[1]), abs=2e-6)
