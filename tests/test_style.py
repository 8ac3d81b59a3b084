"""The tools that read the code, and the rules of the house that no tool knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_import_rule import ROOT, programs, relative

SHELL = sorted([*(ROOT / "scripts").glob("*.sh"), *(ROOT / "deployment").rglob("*.sh"), ROOT / ".ci" / "run"])
NO_TORCH = """
import builtins, runpy, sys
sys.argv = [{program!r}, "--help"]
try:
    runpy.run_path({program!r}, run_name="__main__")
finally:
    slow = {{"torch", "torchvision", "ts", "matplotlib", "optuna", "wandb"}} & set(sys.modules)
    assert not slow, f"--help imports {{slow}}"
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("words", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)], ids=" ".join)
def test_tool_has_nothing_to_say(words: tuple[str, ...]) -> None:
    told = run("-m", *words)
    assert told.returncode == 0, told.stdout + told.stderr


def test_every_command_is_read_by_ruff() -> None:
    """Commands have no suffix: ruff reads those that pyproject.toml names."""
    named = set(re.findall(r'"(scripts/[^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    assert {relative(p) for p in programs() if not p.suffix} <= named


@pytest.mark.parametrize("program", programs(), ids=relative)
def test_help_is_told_at_once_and_without_torch(program: Path) -> None:
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}  # go on in this interpreter
    code = NO_TORCH.format(program=str(program))
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert told.returncode == 0, told.stderr
    assert "usage:" in told.stdout


@pytest.mark.parametrize("program", [p for p in [*programs(), *SHELL] if p.parent != ROOT], ids=relative)
def test_a_command_is_executable_and_what_is_only_sourced_is_not(program: Path) -> None:
    assert os.access(program, os.X_OK) == program.read_bytes().startswith(b"#!")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("script", SHELL, ids=relative)
def test_b0_01_b0_02_shell_scripts_parse_and_end_no_line_in_a_blank(script: Path) -> None:
    r"""B0-01, B0-02: a blank after a \ cut a command in two, and its flags were run as programs."""
    told = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    lines = script.read_text(encoding="utf-8").splitlines()
    assert [i for i, line in enumerate(lines, 1) if line != line.rstrip()] == []
    assert "set -euo pipefail" in lines or script.name == "environment.sh"


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=relative)
def test_b1_19_pages_hold_no_invisible_characters(page: Path) -> None:
    r"""B1-19: a no-break space inside a command, and a \ at the end of its last line."""
    if not page.exists():
        pytest.skip(f"there is no {page.name} yet")
    text = page.read_text(encoding="utf-8")
    assert not re.findall("[\u00a0\u200b\u200c\u200d\u2060\ufeff]", text)
    assert not re.findall(r"\\[ \t]+$|\\\n```", text, re.MULTILINE)
