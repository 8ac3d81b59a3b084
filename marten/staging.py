"""Bringing a data set to the disk of the machine that reads it: once per node, in parallel, verified, resumable.

A staged set is a folder beside a marker `<folder>.staged.json`, written last. Everything before it can be interrupted:
each file is put in place whole, so a second try takes up what the first left (B0-05, B3-06), also in the same sandbox.
"""

from __future__ import annotations

import bz2
import contextlib
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from marten.errors import DataError, MartenError
from marten.files import write_text

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
Progress = Callable[[int, int], None]
_CHUNK = 1 << 20
_LITTER = ("__MACOSX", ".DS_Store", "Thumbs.db")


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


def is_archive(path: Path) -> bool:
    """Whether a name is that of an archive that can be staged."""
    return path.name.lower().endswith(ARCHIVES)


def stage(
    source: Path,
    into: Path | None = None,
    *,
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
    target = (Path(into).absolute() if into else _own_place(source)) / _stem(source)
    if target == source:
        raise DataError(f"{source} would be staged onto itself: give another folder with --into")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            found = _already(source, target, digest)
            return found or _bring(source, target, workers, link, digest, progress)
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


def _bring(source: Path, target: Path, workers: int, link: bool, digest: str, progress: Progress) -> Staged:
    _marker(target).unlink(missing_ok=True)
    if target.is_symlink():
        target.unlink()
    if target.is_dir():  # of another source with this name; its marker is gone, so it is no longer trusted
        shutil.rmtree(target)
    files = _files(source) if source.is_dir() else {}
    sha256 = _verified(source, digest) if source.is_file() else _listing_digest(files)
    partial = target.with_name(f"{target.name}.partial-{sha256[:12]}")
    for stale in set(target.parent.glob(f"{target.name}.partial-*")) - {partial}:
        shutil.rmtree(stale, ignore_errors=True)
    if source.is_dir():
        sizes = {name: path.stat().st_size for name, path in files.items()}
        if link:
            target.symlink_to(source, target_is_directory=True)
        else:
            _need_space(partial, sum(sizes.values()), source)
            _copy_all(files, partial, workers, progress)
    elif zipfile.is_zipfile(source):
        sizes = _unzip(source, partial, workers, progress)
    elif tarfile.is_tarfile(source):
        sizes = _untar(source, partial, progress)
    else:
        raise DataError(f"{source} is no readable archive: it is damaged, cut short or of another kind")
    if not sizes:
        raise DataError(f"{source} holds no file")
    if not link or source.is_file():
        os.replace(partial, target)
    staged = Staged(target, len(sizes), sum(sizes.values()), sha256, True)
    told = {"source": _identity(source), "files": staged.files, "size_bytes": staged.size_bytes, "sha256": sha256}
    write_text(_marker(target), json.dumps(told | {"digest": digest}) + "\n")
    return staged


def _verified(source: Path, digest: str) -> str:
    """The archive's sha256, after comparing it with what was promised."""
    kind, _, wanted = digest.rpartition(":")
    if digest and kind not in ("sha256", "md5"):
        raise DataError(f"a digest is sha256:… or md5:…, found {digest!r}")
    sums = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with open(source, "rb") as file:
        while chunk := file.read(_CHUNK):
            for sum_ in sums.values() if kind == "md5" else [sums["sha256"]]:
                sum_.update(chunk)
    if digest and sums[kind].hexdigest() != wanted.lower():
        raise DataError(
            f"{source} has the {kind} {sums[kind].hexdigest()}, not {wanted}: it is damaged or another file"
        )
    return sums["sha256"].hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """Files below a folder by relative name, sorted, so that every node lists them alike (B3-07)."""
    found = (p for p in folder.rglob("*") if p.is_file() and not any(part in _LITTER for part in p.parts))
    return dict(sorted((p.relative_to(folder).as_posix(), p) for p in found))


def _listing_digest(files: dict[str, Path]) -> str:
    lines = (f"{name}\t{path.stat().st_size}\n" for name, path in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _need_space(partial: Path, wanted_bytes: int, source: Path) -> None:
    there = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file()) if partial.is_dir() else 0
    free = shutil.disk_usage(partial.parent).free
    if wanted_bytes - there > free:
        raise DataError(
            f"{source} needs {wanted_bytes / 1e9:.2f} GB in {partial.parent}, where {free / 1e9:.2f} GB are free: name"
            " another disk with --into, or ask the scheduler for a larger one"
        )


def _copy_all(files: dict[str, Path], partial: Path, workers: int, progress: Progress) -> None:
    def copy(name: str) -> None:
        with open(files[name], "rb") as stream:
            _put(stream, partial / name, files[name].stat().st_size)

    _in_parallel(copy, list(files), workers, progress)


def _unzip(source: Path, partial: Path, workers: int, progress: Progress) -> dict[str, int]:
    try:
        with zipfile.ZipFile(source) as archive:
            members = {_inside(i.filename, source): i for i in archive.infolist() if _wanted(i.filename, i.is_dir())}
            _need_space(partial, sum(i.file_size for i in members.values()), source)

            def extract(name: str) -> None:
                # zipfile shares one file handle under a lock, and compares each member's checksum at its end
                with archive.open(members[name]) as stream:
                    _put(stream, partial / name, members[name].file_size)

            _in_parallel(extract, sorted(members), workers, progress)
            return {name: info.file_size for name, info in members.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{source} is damaged: {error}") from error


def _untar(source: Path, partial: Path, progress: Progress) -> dict[str, int]:
    sizes: dict[str, int] = {}
    try:
        with _decompressed(source) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if member.isfile() and _wanted(member.name, False):
                    name = _inside(member.name, source)
                    inside = archive.extractfile(member)
                    assert inside is not None
                    _need_space_for(member.size, partial, source)
                    _put(inside, partial / name, member.size)
                    sizes[name] = member.size
                    progress(len(sizes), 0)
            while stream.read(_CHUNK):  # to the very end, where the checksum of the compression is
                pass
    except (lzma.LZMAError, gzip.BadGzipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise DataError(f"{source} is damaged or cut short: {error}") from error
    return sizes


def _decompressed(source: Path) -> IO[bytes]:
    with open(source, "rb") as file:
        start = file.read(6)
    for magic, module in ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ\x00", lzma)):
        if start.startswith(magic):
            return cast(IO[bytes], module.open(source, "rb"))
    return open(source, "rb")


def _need_space_for(size_bytes: int, partial: Path, source: Path) -> None:
    if size_bytes > shutil.disk_usage(partial.parent).free:
        raise DataError(f"no room in {partial.parent} for the files of {source}: name another disk with --into")


def _wanted(name: str, folder: bool) -> bool:
    return not folder and not any(part in _LITTER for part in PurePosixPath(name).parts)


def _inside(name: str, source: Path) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{source} holds {name!r}, which lies outside of the archive: it is not unpacked")
    return path.as_posix()


def _put(stream: IO[bytes], path: Path, size_bytes: int) -> None:
    """Write one file whole or not at all; what an earlier try left whole is kept."""
    if path.is_file() and path.stat().st_size == size_bytes:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    neighbour = path.with_name(path.name + ".part")
    try:
        with open(neighbour, "wb") as file:
            shutil.copyfileobj(stream, file, _CHUNK)
        os.replace(neighbour, path)
    finally:
        neighbour.unlink(missing_ok=True)


def _in_parallel(work: Callable[[str], None], names: list[str], workers: int, progress: Progress) -> None:
    if workers < 1:
        raise MartenError(f"--workers must be at least 1, found {workers}")
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done, _ in enumerate(pool.map(work, names), 1):
                progress(done, len(names))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
