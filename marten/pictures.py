"""Where pictures to be answered come from: folders, zips and lists, in one order that every shard agrees on."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from marten.datasets import SUFFIXES
from marten.errors import DataError, UsageError

_Member = tuple[Path, str]


@dataclass(frozen=True)
class Sources:
    """Pictures that lie in folders and zips, named before any of them is read.

    Attributes:
        ids: one per picture, unique, in natural order (2 before 10): its path within the source, without its suffix
            where that is enough to tell it from the others.
        members: (folder or zip, name in it) of each.
    """

    ids: tuple[str, ...]
    members: tuple[_Member, ...]

    def shard(self, number: int, count: int) -> Sources:
        """Every `count`-th picture, from the `number`-th on (1-based): shards are disjoint and together everything.

        Raises:
            UsageError: number not in 1..count.
        """
        if not 1 <= number <= count:
            raise UsageError(f"--shard must be 1/{count} to {count}/{count}, found {number}/{count}")
        return Sources(self.ids[number - 1 :: count], self.members[number - 1 :: count])

    def since(self, done: int) -> Sources:
        """What is left after the first `done`."""
        return Sources(self.ids[done:], self.members[done:])

    @property
    def digest(self) -> str:
        """Hex sha256 over the ids: two runs over other pictures are told apart."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()


def find_sources(words: Sequence[str | Path]) -> Sources:
    """Name all pictures below folders, in zips, in lists (.txt or .csv, a path per line) and given singly.

    Raises:
        DataError: a word that names nothing, a damaged zip, or no picture at all.
    """
    members: dict[_Member, None] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            found = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
            members.update(dict.fromkeys((path, name) for name in found if _is_picture(name)))
        elif not path.is_file():
            raise DataError(f"no folder, zip, list or picture at {path}")
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found = sorted(i.filename for i in archive.infolist() if not i.is_dir())
            members.update(dict.fromkeys((path, name) for name in found if _is_picture(name)))
        elif path.suffix.lower() in (".txt", ".csv", ".list"):
            members.update(dict.fromkeys((path.parent, line) for line in _listed(path)))
        elif _is_picture(path.name):
            members[(path.parent, path.name)] = None
        else:
            raise DataError(f"{path} is no picture, folder, zip or list: it is damaged or of another kind")
    if not members:
        raise DataError(f"no picture in {', '.join(map(str, words))} ({', '.join(sorted(SUFFIXES))})")
    names = _ids([name for _, name in members])
    order = sorted(range(len(names)), key=lambda i: natural(names[i]))
    kept = list(members)
    return Sources(tuple(names[i] for i in order), tuple(kept[i] for i in order))


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith("._") and "__MACOSX" not in path.parts


def _listed(path: Path) -> list[str]:
    lines = [line.strip().partition(",")[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[1:] if lines and not _is_picture(lines[0]) else lines  # a header


def _ids(names: list[str]) -> list[str]:
    """Short where all stay apart: without the folders that all share, and without suffixes (B0-22)."""
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    shared = 0
    while all(len(parts) > shared for parts in folders) and len({parts[shared] for parts in folders}) == 1:
        shared += 1
    inner = ["/".join(PurePosixPath(name).parts[shared:]) for name in names]
    short = [str(PurePosixPath(name).with_suffix("")) for name in inner]
    for candidates in (short, inner, names):
        if len(set(candidates)) == len(names):
            return candidates
    raise DataError("two sources hold pictures of the same names: ask about them one after the other")


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts 2 before 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


@contextmanager
def opened() -> Iterator[Callable[[_Member], bytes]]:
    """A function that reads one member; threads may share it. A zip is opened once per thread."""
    local = threading.local()
    archives: list[zipfile.ZipFile] = []
    is_folder = functools.cache(Path.is_dir)

    def read(member: _Member) -> bytes:
        place, name = member
        if is_folder(place):
            with open(os.path.join(place, name), "rb", buffering=0) as file:
                return file.read()
        mine = local.__dict__.setdefault("archives", {})
        if place not in mine:
            mine[place] = zipfile.ZipFile(place)
            archives.append(mine[place])
        data: bytes = mine[place].read(name)
        return data

    try:
        yield read
    finally:
        for archive in archives:
            archive.close()
