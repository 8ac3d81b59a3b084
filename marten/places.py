"""Some classes of Places365 out of its tar of 1.8 million pictures: read once, only those kept, and taken up again.

The tar (places365standard_easyformat.tar, 21 GB) holds places365_standard/train/<class>/*.jpg and val/<class>/*.jpg.
Nothing but the wanted pictures is written, so that a disk of a few gigabytes is enough. A transfer that was cut goes
on at the picture where it stood. B2-16: the original read the whole tar twice for each class.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from marten.errors import DataError
from marten.files import replacing, write_text

TAR = "http://data.csail.mit.edu/places/places365/places365standard_easyformat.tar"
_PARTS = ("train", "val")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Kept:
    """What was kept of a tar.

    Attributes:
        counts: pictures by "train/<class>" and "val/<class>".
        size_bytes: of the tar.
        sha256: of the tar; empty where the transfer was taken up amid it, and so not read in one go.
    """

    counts: dict[str, int]
    size_bytes: int
    sha256: str


def keep_places(
    source: str,
    into: Path,
    classes: Iterable[str],
    digest: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Kept:
    """Read a tar of Places365's layout once and write the pictures of some classes.

    Writes <into>/train/<class>/, <into>/val/<class>/ and SHA256SUMS of every picture, which `sha256sum -c` reads.

    Args:
        source: path or http(s) address of the tar.
        into: folder to make, or to go on filling.
        classes: the names of their folders.
        digest: "sha256:…" or "md5:…" that the tar must have; it can only be told of a tar read in one go.
        progress: called with (bytes read, bytes in all).

    Raises:
        DataError: no tar, a damaged one, another digest, a transfer that was cut (the same call goes on), or a class
            without a picture.
    """
    wanted = set(classes)
    kind, _, promised = digest.rpartition(":")
    if digest and kind not in ("sha256", "md5"):
        raise DataError(f"a digest is sha256:… or md5:…, found {digest!r}")
    state = _State(into / ".places.json", source, sorted(wanted))
    try:
        with _Stream(source, state.offset, digest, progress) as stream:
            if state.tag and stream.tag != state.tag:
                raise DataError(f"{source} is another file than when this began: remove {into} to start anew")
            state.tag = stream.tag
            with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as archive:
                for member in archive:
                    state.mark(member.offset + stream.start)
                    place = _place(member.name, wanted)
                    if member.isfile() and place is not None:
                        inside = archive.extractfile(member)
                        assert inside is not None
                        state.sums[place] = _put(inside, into / place, member.size)
            stream.drain()
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, tarfile.ReadError) as error:
        state.save()
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"{source} broke off after {state.offset / 1e6:.1f} MB ({reason}); {len(state.sums)} pictures are kept, and"
            " the same command goes on from there"
        ) from error
    except BaseException:
        state.save()
        raise
    found = stream.digests
    if promised and found and found[kind] != promised.lower():
        state.path.unlink(missing_ok=True)
        raise DataError(f"{source} has the {kind} {found[kind]}, not {promised}: it is damaged or another file")
    counts = _counts(state.sums, wanted)
    write_text(into / "SHA256SUMS", "".join(f"{sha}  {place}\n" for place, sha in sorted(state.sums.items())))
    state.path.unlink(missing_ok=True)
    return Kept(counts, stream.read_bytes, found.get("sha256", ""))


class _State:
    """Where a transfer stands, beside the pictures; every picture before `offset` is there."""

    def __init__(self, path: Path, source: str, classes: list[str]) -> None:
        self.path = path
        self._made_of = {"source": source, "classes": classes}
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if told and told["made_of"] != self._made_of:
            raise DataError(
                f"{path.parent} was begun with {told['made_of']}: repeat that to go on, or remove the folder"
            )
        self.offset: int = told.get("offset", 0)
        self.tag: str = told.get("tag", "")
        self.sums: dict[str, str] = told.get("sums", {})
        self._saved_at = self.offset

    def mark(self, offset: int) -> None:
        """Everything before `offset` is done."""
        self.offset = offset
        if offset - self._saved_at > 256 * _CHUNK:
            self.save()

    def save(self) -> None:
        told = {"made_of": self._made_of, "offset": self.offset, "tag": self.tag, "sums": self.sums}
        write_text(self.path, json.dumps(told))
        self._saved_at = self.offset


class _Stream:
    """A tar's bytes from an offset on, counted and digested as they pass.

    Attributes:
        start: offset that the source really began at.
        tag: what tells the file from a later one of the same address.
        size_bytes: of the whole.
    """

    def __init__(self, source: str, offset: int, digest: str, progress: Callable[[int, int], None]) -> None:
        self._progress = progress
        self._file: IO[bytes]
        if re.match(r"https?://", source):
            request = urllib.request.Request(source, headers={"Range": f"bytes={offset}-"} if offset else {})
            answer = urllib.request.urlopen(request, timeout=60)
            self.start = offset if answer.status == 206 else 0
            left = answer.headers.get("Content-Length")
            self.size_bytes = self.start + int(left) if left else 0
            self.tag = str(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or self.size_bytes)
            self._file = answer
        else:
            path = Path(source)
            try:
                self._file = open(path, "rb")  # noqa: SIM115  closed by __exit__
            except OSError as error:
                raise DataError(f"no tar at {source}: {error.strerror}") from error
            # a file on this machine is read again: that costs seconds and saves its digest
            self.start = 0
            self.size_bytes = path.stat().st_size
            self.tag = f"{self.size_bytes} {path.stat().st_mtime_ns}"
        names = {"sha256", digest.partition(":")[0]} - {""}
        self._sums = {} if self.start else {name: hashlib.new(name, usedforsecurity=False) for name in names}
        self.read_bytes = self.start

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        for sum_ in self._sums.values():
            sum_.update(data)
        self.read_bytes += len(data)
        self._progress(self.read_bytes, self.size_bytes)
        if not data and self.size_bytes and self.read_bytes < self.size_bytes:
            raise ConnectionError(f"{self.size_bytes - self.read_bytes:,} bytes are missing at its end")
        return data

    def drain(self) -> None:
        """Read what is behind the tar's end mark, for the digest."""
        while self.read(_CHUNK):
            pass

    @property
    def digests(self) -> dict[str, str]:
        return {name: sum_.hexdigest() for name, sum_ in self._sums.items()}

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _place(name: str, wanted: set[str]) -> str | None:
    """train/<class>/<file> for a picture that is wanted, wherever the tar's own folders begin."""
    parts = PurePosixPath(name).parts
    if len(parts) < 3 or parts[-3] not in _PARTS or parts[-2] not in wanted or parts[-1].startswith("."):
        return None
    return "/".join(parts[-3:])


def _put(inside: IO[bytes], path: Path, size_bytes: int) -> str:
    data = inside.read(size_bytes + 1)
    if len(data) != size_bytes:
        raise ConnectionError(f"{path.name} is cut short")
    if not path.is_file() or path.read_bytes() != data:
        with replacing(path) as neighbour:
            neighbour.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _counts(sums: Iterable[str], wanted: set[str]) -> dict[str, int]:
    counts = {f"{part}/{name}": 0 for part in _PARTS for name in sorted(wanted)}
    for place in sums:
        counts[place.rpartition("/")[0]] += 1
    empty = [name for name in sorted(wanted) if not counts[f"train/{name}"]]
    if empty:
        raise DataError(f"the tar holds no train/{', train/'.join(empty)}: look at the names of its folders")
    return counts
