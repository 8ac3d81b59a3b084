"""scripts/bench cells measures the steps as a user runs them, and leaves the project as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest

from marten.files import ROOT


def bench(root, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/bench"), "cells", "--root", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_step_is_measured_in_a_copy(tiny):
    before = sorted(tiny.root.rglob("*"))
    told = bench(tiny.root, "--rounds", "1", "--check")
    assert sorted(tiny.root.rglob("*")) == before
    lines = told.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if "crops/s" in line and "wanted" not in line] == [
        "export, PNG, parity, 1 process",
        "export, PNG, parity, 2 processes",
        "export, shards, parity, 2 processes",
        "export, shards, slice, 2 processes",
    ]
    assert sum("crops a minute" in line for line in lines) == 2
    # a few dozen crops take as long as the programs' start: far below what is to be reached
    assert any(line.startswith("MISSED") for line in lines)
    assert told.returncode == 1, told.stderr


def test_a_folder_that_is_no_project_is_one_line(tmp_path):
    told = bench(tmp_path)
    assert (told.returncode, told.stderr.count("\n")) in ((1, 1), (2, 1)), told.stderr
