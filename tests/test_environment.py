"""Programs choose their Python by themselves, before anything that has to be installed is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from marten.files import ROOT

BARE = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")}
PROGRAMS = [
    path
    for path in [ROOT / "train_main.py", ROOT / "predict_main.py", *sorted((ROOT / "scripts").iterdir())]
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env python3")
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_a_python_without_packages_is_told_in_one_line(program: Path) -> None:
    # -S leaves site-packages out: the Python of a machine where nothing has been installed
    command = [sys._base_executable, "-S", str(program), "--help"]  # type: ignore[attr-defined]
    done = subprocess.run(command, env=BARE, capture_output=True, text=True, timeout=60)
    if (ROOT / ".venv" / "bin" / "python").is_file():
        assert (done.returncode, done.stdout[:6]) == (0, "usage:")
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert len(done.stderr.splitlines()) == 1
        assert "bash scripts/quickstart.sh" in done.stderr


def test_a_program_goes_on_in_the_environment_of_the_project(tmp_path: Path) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "in .venv: $*"\n')
    python.chmod(0o755)
    code = (
        f"from pathlib import Path; from marten.environment import enter_environment as e; e(Path({str(tmp_path)!r}))"
    )
    command = [sys._base_executable, "-S", "-c", code, "word"]  # type: ignore[attr-defined]
    done = subprocess.run(command, cwd=ROOT, env=BARE, capture_output=True, text=True, timeout=60)
    assert done.stdout == "in .venv: -c word\n"
    chosen = subprocess.run(
        command, cwd=ROOT, env=BARE | {"VIRTUAL_ENV": "x"}, capture_output=True, text=True, timeout=60
    )
    assert "in .venv" not in chosen.stdout
