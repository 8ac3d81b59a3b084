"""Bringing a data set to the disk of the machine that reads it: once per node, in parallel, verified, resumable.

A staged set is a folder beside a marker `<folder>.staged.json`, written last. Everything before it can be interrupted:
each file is put in place whole, so a second try takes up what the first left (B0-05, B3-06), also in the same sandbox.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from marten.errors import DataError
from marten.files import write_text
from marten.unpacking import ARCHIVES, LITTER, Progress, in_parallel, is_archive, need_space, put, unpack_into

_UNFINISHED = "{}\n"
"""In a marker: the folder is ours, and not whole."""


@dataclass(frozen=True)
class Staged:
    """A data set on this machine.

    Attributes:
        folder: where its files are.
        files: how many.
        size_bytes: of all of them.
        sha256: of the archive, or of the folder's sorted list of names and sizes.
        fresh: whether this call brought it here; False when it was here already.
    """

    folder: Path
    files: int
    size_bytes: int
    sha256: str
    fresh: bool


def node_local_folder() -> Path:
    """The disk that the scheduler gave this job on this machine, else the system's temporary folder."""
    for name in ("SLURM_TMPDIR", "_CONDOR_SCRATCH_DIR", "TMPDIR"):
        folder = Path(os.environ.get(name) or "/nowhere")
        if folder.is_dir():
            return folder
    return Path(tempfile.gettempdir())


def stage(
    source: Path,
    into: Path | None = None,
    *,
    name: str = "",
    below: str = "",
    workers: int = 4,
    link: bool = False,
    digest: str = "",
    progress: Progress = lambda done, total: None,
) -> Staged:
    """Put a data set on the node's own disk, or find it there.

    Args:
        source: a zip, tar or tgz archive, or a folder.
        into: folder that will hold the staged set; when None the node's own disk, below it a folder of this source
            where the scheduler gave the job none of its own.
        name: of the staged folder; the source's own without its ending when empty.
        below: folder of the archive that holds everything, and is left out of the names; "" for none.
        workers: threads that copy or unpack; a tar is read by one.
        link: make a symbolic link to a folder instead of a copy.
        digest: "sha256:…" or "md5:…" that the archive must have.
        progress: called with (files done, files in all; 0 when not yet known).

    Returns:
        Where it is. A second call, in this process or another one, returns at once.

    Raises:
        DataError: nothing there, a damaged archive, another digest, a name that leaves the folder, or too small a disk.
    """
    source = Path(source).absolute()
    if not source.exists():
        raise DataError(f"nothing to stage at {source}: give a .zip, .tar, .tgz or a folder")
    if source.is_file() and not is_archive(source):
        raise DataError(f"{source} is neither a folder nor an archive ({', '.join(ARCHIVES)})")
    target = (Path(into).absolute() if into else _own_place(source)) / (name or _stem(source))
    if target == source or target in source.parents:
        raise DataError(f"{source} would be staged onto itself: give another folder with --into")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            found = _already(source, target, digest)
            if found is None:
                _make_room(target, is_scratch=into is None)
            return found or _bring(source, target, below, workers, link, digest, progress)
    except OSError as error:
        raise DataError(
            f"cannot stage {source} into {target.parent}: {error.strerror or error}; what is there already is kept and"
            " taken up by the next try"
        ) from error


def _own_place(source: Path) -> Path:
    """Below the node's disk; where other jobs may share that, in a folder that this source has for itself."""
    folder = node_local_folder()
    if str(folder) in (os.environ.get("SLURM_TMPDIR"), os.environ.get("_CONDOR_SCRATCH_DIR")):
        return folder
    own = hashlib.sha256(json.dumps([str(source), *_identity(source)]).encode()).hexdigest()[:12]
    return folder / f"marten-{os.getuid()}" / own


def _stem(source: Path) -> str:
    name = source.name
    ends = [end for end in ARCHIVES if source.is_file() and name.lower().endswith(end)]
    return name[: -max(map(len, ends))] if ends else name


def _marker(target: Path) -> Path:
    return target.with_name(target.name + ".staged.json")


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One task per node brings the set; the others wait here and then find it."""
    with open(target.with_name(target.name + ".lock"), "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _already(source: Path, target: Path, digest: str) -> Staged | None:
    try:
        told = json.loads(_marker(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not target.is_dir() or told.get("source") != _identity(source) or told.get("digest", "") != digest:
        return None
    return Staged(target, told["files"], told["size_bytes"], told["sha256"], False)


def _identity(source: Path) -> list[str | int]:
    """What tells at a glance that a source has changed; a folder is told by its list of names and sizes."""
    if source.is_dir():
        return [str(source), _listing_digest(_files(source))]
    state = source.stat()
    return [source.name, state.st_size, state.st_mtime_ns]


def _bring(source: Path, target: Path, below: str, workers: int, link: bool, digest: str, progress: Progress) -> Staged:
    identity = _identity(source)
    partial = target.with_name(
        f"{target.name}.partial-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"
    )
    for stale in set(target.parent.glob(f"{target.name}.partial-*")) - {partial}:
        shutil.rmtree(stale, ignore_errors=True)
    if source.is_dir():
        files = _files(source)
        sizes, sha256 = {name: path.stat().st_size for name, path in files.items()}, _listing_digest(files)
        if not link:
            need_space(partial, sum(sizes.values()), source)
            _copy_all(files, partial, workers, progress)
    else:
        sizes, sha256 = unpack_into(source, partial, below, digest, workers, progress)
    if not sizes:
        raise DataError(f"{source} holds no file")
    write_text(_marker(target), _UNFINISHED)
    if link and source.is_dir():
        target.symlink_to(source, target_is_directory=True)
    else:
        os.replace(partial, target)
    staged = Staged(target, len(sizes), sum(sizes.values()), sha256, True)
    told = {"source": identity, "files": staged.files, "size_bytes": staged.size_bytes, "sha256": sha256}
    write_text(_marker(target), json.dumps(told | {"digest": digest}) + "\n")
    return staged


def _make_room(target: Path, is_scratch: bool) -> None:
    """Remove what was staged there before, of another source with this name.

    What nobody staged is removed only from a job's own scratch, where a dirty sandbox may hold half of a set (B0-05).
    """
    marker = _marker(target)
    if target.is_symlink() or (target.is_dir() and any(target.iterdir())):
        if not is_scratch and not marker.exists():
            raise DataError(f"{target} is there, and was not staged: remove it, or give another folder with --into")
        write_text(marker, _UNFINISHED)  # it is no longer whole, and still ours
        if target.is_symlink():
            target.unlink()
        else:
            shutil.rmtree(target)
    elif target.is_dir():
        target.rmdir()
    marker.unlink(missing_ok=True)


def _files(folder: Path) -> dict[str, Path]:
    """Files below a folder by relative name, sorted, so that every node lists them alike (B3-07)."""
    found = (p for p in folder.rglob("*") if p.is_file() and not any(part in LITTER for part in p.parts))
    return dict(sorted((p.relative_to(folder).as_posix(), p) for p in found))


def _listing_digest(files: dict[str, Path]) -> str:
    lines = (f"{name}\t{path.stat().st_size}\n" for name, path in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _copy_all(files: dict[str, Path], partial: Path, workers: int, progress: Progress) -> None:
    def copy(name: str) -> None:
        with open(files[name], "rb") as stream:
            put(stream, partial / name, files[name].stat().st_size)

    in_parallel(copy, list(files), workers, progress)
