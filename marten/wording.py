"""Between the command line and pictures: what words name which files, and how an answer reads in one line."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marten.datasets import SUFFIXES
from marten.errors import DataError


def expand_paths(words: Sequence[str]) -> list[Path]:
    """Files named by paths, folders and glob patterns, each once, in the order given, folders sorted.

    Hidden files and folders are left out of folders.

    Raises:
        DataError: a word that names nothing, or a folder without pictures.
    """
    found: dict[Path, None] = {}
    for word in words:
        path = Path(word)
        matched = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(word, recursive=True))]
        if not matched:
            raise DataError(f"no picture, folder or pattern {word!r} in {Path.cwd()}")
        named: dict[Path, None] = {}
        for one in matched:
            named.update(dict.fromkeys(_pictures_in(one) if one.is_dir() else [one]))
        if not named:
            raise DataError(f"no picture in the folder {word} ({', '.join(sorted(SUFFIXES))})")
        found.update(named)
    return list(found)


def _pictures_in(folder: Path) -> list[Path]:
    shown = (p for p in folder.rglob("*") if not any(part[0] == "." for part in p.relative_to(folder).parts))
    return sorted(p for p in shown if p.suffix.lower() in SUFFIXES and p.is_file())


def answer_text(answer: Mapping[str, Any]) -> str:
    """An answer for a person: "dog 0.8023, cat 0.1977"."""
    return ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in answer.items())
