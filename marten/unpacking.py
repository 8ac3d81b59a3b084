"""Archives into folders: zip and tar, file by file, each whole or not at all, summed up while they are read.

What an earlier try left whole is kept, so a second one takes up where it ended.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from marten.errors import DataError, UsageError

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
LITTER = ("__MACOSX", ".DS_Store", "Thumbs.db")
Progress = Callable[[int, int], None]
_CHUNK = 1 << 20


def is_archive(path: Path) -> bool:
    """Whether a name is that of an archive that can be unpacked."""
    return path.name.lower().endswith(ARCHIVES)


def unpack_into(
    source: Path, into: Path, below: str, digest: str, workers: int, progress: Progress
) -> tuple[dict[str, int], str]:
    """Unpack an archive, reading a tar once from end to end and a zip by several threads.

    Args:
        source: the archive.
        into: folder to fill; what lies in it from an earlier try of the same archive is kept.
        below: folder of the archive that holds everything, and is left out of the names; "" for none.
        digest: "sha256:…" or "md5:…" that the archive must have; "" for none.
        workers: threads, for a zip.
        progress: called with (files done, files in all; 0 when not yet known).

    Returns:
        (size in bytes by name, hex sha256 of the archive).

    Raises:
        DataError: damaged, cut short, of another digest, or holding a name that leaves the folder.
    """
    kind, wanted = _promised(digest)
    if zipfile.is_zipfile(source):
        found = _sums(source, kind)
        _hold_to(source, kind, wanted, found)
        return _unzip(source, into, below, workers, progress), found["sha256"]
    if not tarfile.is_tarfile(source):
        raise DataError(f"{source} is no readable archive: it is damaged, cut short or of another kind")
    sizes, found = _untar(source, into, below, kind, progress)
    try:
        _hold_to(source, kind, wanted, found)
    except DataError:
        shutil.rmtree(into, ignore_errors=True)
        raise
    return sizes, found["sha256"]


def need_space(folder: Path, wanted_bytes: int, source: Path) -> None:
    """Refuse what the disk below a folder cannot hold beside what the folder holds already.

    Raises:
        DataError: with both sizes.
    """
    there = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(folder.parent).free
    if wanted_bytes - there > free:
        raise DataError(
            f"{source} needs {wanted_bytes / 1e9:.2f} GB in {folder.parent}, where {free / 1e9:.2f} GB are free: name"
            " another disk with --into, or ask the scheduler for a larger one"
        )


def put(stream: IO[bytes], path: Path, size_bytes: int) -> None:
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


def in_parallel(work: Callable[[str], None], names: list[str], workers: int, progress: Progress) -> None:
    """Do a work for each name by several threads; the first that fails ends it.

    Raises:
        UsageError: no thread at all.
    """
    if workers < 1:
        raise UsageError(f"--workers must be at least 1, found {workers}")
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done, _ in enumerate(pool.map(work, names), 1):
                progress(done, len(names))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _unzip(source: Path, into: Path, below: str, workers: int, progress: Progress) -> dict[str, int]:
    try:
        with zipfile.ZipFile(source) as archive:
            wanted = (i for i in archive.infolist() if not i.is_dir() and _wanted(i.filename))
            members = {_inside(i.filename, below, source): i for i in wanted}
            need_space(into, sum(i.file_size for i in members.values()), source)

            def extract(name: str) -> None:
                # zipfile shares one file handle under a lock, and compares each member's checksum at its end
                with archive.open(members[name]) as stream:
                    put(stream, into / name, members[name].file_size)

            in_parallel(extract, sorted(members), workers, progress)
            return {name: info.file_size for name, info in members.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{source} is damaged: {error}") from error


def _untar(
    source: Path, into: Path, below: str, kind: str, progress: Progress
) -> tuple[dict[str, int], dict[str, str]]:
    sizes: dict[str, int] = {}
    sums = _fresh_sums(kind)
    try:
        with (
            _Summed(source, sums) as raw,
            io.BufferedReader(raw, _CHUNK) as buffered,
            _decompressed(buffered) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            for member in archive:
                if member.isfile() and _wanted(member.name):
                    name = _inside(member.name, below, source)
                    inside = archive.extractfile(member)
                    assert inside is not None
                    if member.size > shutil.disk_usage(into.parent).free:
                        raise DataError(
                            f"no room in {into.parent} for the files of {source}: name another disk with --into"
                        )
                    put(inside, into / name, member.size)
                    sizes[name] = member.size
                    progress(len(sizes), 0)
            for rest in (stream, buffered):  # to the very end, where the checksum of the compression is
                while rest.read(_CHUNK):
                    pass
    except (lzma.LZMAError, gzip.BadGzipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise DataError(f"{source} is damaged or cut short: {error}") from error
    return sizes, {name: sum_.hexdigest() for name, sum_ in sums.items()}


class _Summed(io.RawIOBase):
    """A file that is summed up as it is read, so that an archive far away crosses the network once (B3-04)."""

    def __init__(self, path: Path, sums: dict[str, Any]) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed with this one
        self._sums = sums

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        for sum_ in self._sums.values():
            sum_.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def _decompressed(file: io.BufferedReader[Any]) -> Iterator[IO[bytes]]:
    start = file.peek(6)
    for magic, open_ in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open)):
        if start.startswith(magic):
            with cast(IO[bytes], open_(file, "rb")) as stream:
                yield stream
            return
    yield cast(IO[bytes], file)


def _promised(digest: str) -> tuple[str, str]:
    kind, _, wanted = digest.rpartition(":")
    if digest and kind not in ("sha256", "md5"):
        raise DataError(f"a digest is sha256:… or md5:…, found {digest!r}")
    return kind, wanted.lower()


def _fresh_sums(kind: str) -> dict[str, Any]:
    sums: dict[str, Any] = {"sha256": hashlib.sha256()}
    return sums | ({"md5": hashlib.md5(usedforsecurity=False)} if kind == "md5" else {})


def _sums(source: Path, kind: str) -> dict[str, str]:
    sums = _fresh_sums(kind)
    with open(source, "rb") as file:
        while chunk := file.read(_CHUNK):
            for sum_ in sums.values():
                sum_.update(chunk)
    return {name: sum_.hexdigest() for name, sum_ in sums.items()}


def _hold_to(source: Path, kind: str, wanted: str, found: dict[str, str]) -> None:
    if kind and found[kind] != wanted:
        raise DataError(f"{source} has the {kind} {found[kind]}, not {wanted}: it is damaged or another file")


def _wanted(name: str) -> bool:
    return not any(part in LITTER for part in PurePosixPath(name).parts)


def _inside(name: str, below: str, source: Path) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{source} holds {name!r}, which lies outside of the archive: it is not unpacked")
    if below and (len(path.parts) < 2 or path.parts[0] != below):
        raise DataError(f"{source} holds {name!r}, which lies outside of {below}/: it is another archive")
    return PurePosixPath(*path.parts[bool(below) :]).as_posix()
