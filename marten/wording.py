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

    Raises:
        DataError: a word that names nothing, or a folder without pictures.
    """
    found: dict[Path, None] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
            if not inside:
                raise DataError(f"no picture in the folder {path} ({', '.join(sorted(SUFFIXES))})")
            found.update(dict.fromkeys(inside))
        elif path.is_file():
            found[path] = None
        elif matched := sorted(glob.glob(word, recursive=True)):
            found.update(dict.fromkeys(p for p in map(Path, matched) if p.is_file()))
        else:
            raise DataError(f"no picture, folder or pattern {word!r} in {Path.cwd()}")
    return list(found)


def answer_text(answer: Mapping[str, Any]) -> str:
    """An answer for a person: "dog 0.8023, cat 0.1977"."""
    return ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in answer.items())
