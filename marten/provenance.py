"""Where a file came from: the command, the commit, the versions and the date, for the card."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import marten
from marten.files import ROOT


def provenance() -> dict[str, str]:
    """What is needed to do it again: command, commit (with "+changes" if the tree differs), versions, UTC date."""
    versions = {"marten": marten.__version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "pillow"):
        versions[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *map(_without_place, sys.argv[1:])]),
        "commit": _commit(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _without_place(word: str) -> str:
    """Shorten an absolute path to its last name: a card travels, and need not tell of this machine's folders."""
    flag, equals, value = word.rpartition("=")
    return f"{flag}{equals}…/{Path(value).name}" if value.startswith("/") else word


@functools.cache
def _commit() -> str:
    # an image has no history, and is told at its build
    told = os.environ.get("MARTEN_COMMIT", "")
    if told and not (ROOT / ".git").exists():
        return told

    # once: the tree may change while a run of days goes on with the code that it has loaded
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
