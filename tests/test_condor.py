"""A real HTCondor pool runs, stops, moves and resumes a training; it ends in the bits of the uninterrupted one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.schedulers import assert_same_bits, command, condor, prepare, submit, text, uninterrupted, until

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
