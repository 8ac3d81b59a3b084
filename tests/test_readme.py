"""What README and docs tell people to type is understood by the programs."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from marten.files import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
OURS = re.compile(r"^(?:python3? )?((?:train|predict)_main\.py|scripts/(?!\w+\.sh)\w+)(?: |$)")


def commands() -> list[tuple[str, str]]:
    """(page, command) for each command of ours in an indented block, continued lines joined, comments left out."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines() if line.startswith("    ") and " | " not in line]
        found += [(page.name, line) for line in lines if OURS.match(line)]
    return found


def parse(program: Path, words: list[str]) -> None:
    """Let a program read its flags; it exits with 2 if it does not know them."""
    runpy.run_path(str(program))["build_parser"]().parse_args(words)


@pytest.mark.parametrize(("page", "line"), commands())
def test_documented_commands_parse(page: str, line: str) -> None:
    words = shlex.split(re.sub(r"\bpython3? ", "", line, count=1), comments=True)
    program = ROOT / words[0]
    assert program.is_file(), f"{page} names {words[0]}"
    ours, _, trainers = " ".join(map(shlex.quote, words[1:])).partition(" -- ")
    parse(program, shlex.split(ours))
    if trainers:
        parse(ROOT / "train_main.py", shlex.split(trainers))


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_two_commands_stand_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("bash scripts/quickstart.sh", "bash scripts/test.sh"):
        assert f"    {command}\n" in text
        assert Path(ROOT, command.split()[1]).is_file()


def test_the_archiver_command_of_the_readme_names_real_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.strip().startswith("torch-model-archiver")]
    words = shlex.split(line)
    named = [words[words.index(flag) + 1] for flag in ("--model-file", "--handler", "--config-file", "--export-path")]
    named += [path for path in words[words.index("--extra-files") + 1].split(",") if "model_vgg" not in path]
    assert all((ROOT / path).exists() for path in named), named
