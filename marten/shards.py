"""Data sets as a few large files: tar shards in WebDataset's layout, from which each picture is read by its place.

A folder of a million small files is slow to list and to open on a network drive, and decoding starves a GPU. A sharded
set is a folder of 000000.tar, 000001.tar, … (members 000000012.jpg and 000000012.cls, as the package webdataset streams
them), of index.csv, which says where each picture lies, and of shards.json, written last. Training reads by place and
not as a stream, so order, split and augmentation are those of the set as it was: it ends in the same bits.

Decoded shards hold each picture as a .bmp of the pixels that training would decode, for one size of input.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marten.datasets import PictureSet, Sample
from marten.errors import DataError, MartenError, PictureError
from marten.files import available_cpus
from modelspec import Preprocess, sha256_file

FORMAT = "marten-shards/1"
FACTS, INDEX = "shards.json", "index.csv"
_WINDOW = 256
"""Pictures that are read ahead and held in memory at once."""

_COLUMNS = ("path", "label", "sha256", "shard", "offset", "size_bytes")


def find_shards(root: Path, labels: Sequence[str] | None = None) -> PictureSet:
    """List a sharded set without reading a picture; every sample has its key, its picture was read when it was written.

    Args:
        root: folder of the set.
        labels: the classes to expect, in the order of their indices; the set's own when None.

    Raises:
        DataError: no index, a shard that is missing or of another size, or a class that was not expected.
    """
    facts = read_facts(root)
    if labels is not None and not set(facts["labels"]) <= set(labels):
        raise DataError(f"{root} holds the classes {facts['labels']}, but the model knows {list(labels)}")
    for shard in facts["shards"]:
        path = root / shard["name"]
        there = path.stat().st_size if path.is_file() else None
        if there != shard["size_bytes"]:
            told = "missing" if there is None else f"{there} bytes long, not {shard['size_bytes']}"
            raise DataError(f"{path} is {told}: bring the whole set again, or write it anew with scripts/data shards")
    index = {label: i for i, label in enumerate(labels or facts["labels"])}
    try:
        with open(root / INDEX, newline="", encoding="utf-8") as file:
            samples = [
                Sample(
                    id=row["path"],
                    path=root / row["shard"],
                    label=index[row["label"]],
                    key=row["sha256"],
                    span=(int(row["offset"]), int(row["size_bytes"])),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{root / INDEX} is no index of a sharded set: {error}") from error
    if len(samples) != sum(shard["pictures"] for shard in facts["shards"]):
        raise DataError(f"{root / INDEX} lists {len(samples)} pictures, and the shards hold more or fewer")
    rejected = tuple((id_, reason) for id_, reason in facts["rejected"])
    return PictureSet(root, "shards", tuple(index), tuple(samples), rejected, facts["decoded_for_px"])


def read_facts(root: Path) -> dict[str, Any]:
    """What shards.json tells.

    Raises:
        DataError: it is unreadable or of another format.
    """
    try:
        facts = json.loads((root / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {root / FACTS}: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise DataError(f"{root / FACTS} is not of the format {FORMAT}")
    return facts


def check_shards(root: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Compare every shard with the sha256 that it was written with.

    Raises:
        DataError: one was changed.
    """
    shards = read_facts(root)["shards"]
    for done, shard in enumerate(shards, 1):
        if sha256_file(root / shard["name"]) != shard["sha256"]:
            raise DataError(f"{root / shard['name']} is damaged: its sha256 is not that of {FACTS}")
        progress(done, len(shards))


def write_shards(
    pictures: PictureSet,
    into: Path,
    decode_for: Preprocess | None = None,
    shard_mb: float = 256.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PictureSet:
    """Write a data set as shards, whole or not at all, reading each picture once as training will.

    Args:
        pictures: from `find_pictures`; those that cannot be read are listed in shards.json and left out.
        into: folder to make.
        decode_for: keep the pixels that a network of this preprocessing decodes, and not the files.
        shard_mb: size of a shard, a little more for its last picture.
        progress: called with (done, total).

    Returns:
        The sharded set.

    Raises:
        DataError: `into` holds something, or `pictures` are sharded already.
        MartenError: the disk is full or cannot be written; nothing is left there.
    """
    if pictures.layout == "shards":
        raise DataError(f"{pictures.root} is sharded already: give the set that it was made from")
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise DataError(f"{into} holds something already: remove it, or choose another folder with --into")
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{into.name}.", dir=into.parent) as scratch:
            room = Path(scratch, "room")
            room.mkdir()
            _fill(room, pictures, decode_for, int(shard_mb * 1e6), progress)
            if into.exists():
                into.rmdir()
            os.replace(room, into)
    except OSError as error:
        raise MartenError(f"cannot write {into}: {error.strerror or error}. Nothing is left there.") from error
    return find_shards(into)


def _fill(
    room: Path,
    pictures: PictureSet,
    decode_for: Preprocess | None,
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    rejected = list(pictures.rejected)
    with contextlib.closing(_Writer(room, pictures.labels, shard_bytes)) as writer:
        for done, (sample, found) in enumerate(_read(pictures.samples, decode_for), 1):
            if isinstance(found, str):
                rejected.append((sample.id, found))
            else:
                writer.add(sample, *found)
            progress(done, len(pictures.samples))
        writer.finish()
    facts = {
        "format": FORMAT,
        "labels": list(pictures.labels),
        "decoded_for_px": decode_for.min_size_px if decode_for else 0,
        "shards": writer.shards,
        "rejected": sorted(rejected),
    }
    (room / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(
    samples: tuple[Sample, ...], decode_for: Preprocess | None
) -> Iterator[tuple[Sample, tuple[bytes, str, str] | str]]:
    """Pictures in an order that mixes the classes: (bytes to keep, their suffix, sha256 of the file), or the reason."""
    plain = Preprocess()

    def look(sample: Sample) -> tuple[bytes, str, str] | str:
        try:
            data = sample.path.read_bytes()
            picture = (decode_for or plain).read(data)
        except OSError as error:
            return error.strerror or str(error)
        except PictureError as error:
            return str(error)
        key = hashlib.sha256(data).hexdigest()
        if decode_for is None:
            return data, sample.path.suffix.lower(), key
        buffer = io.BytesIO()
        picture.save(buffer, "BMP")
        return buffer.getvalue(), ".bmp", key

    mixed = sorted(samples, key=lambda s: hashlib.sha256(s.id.encode()).digest())
    with ThreadPoolExecutor(available_cpus()) as pool:
        for start in range(0, len(mixed), _WINDOW):
            window = mixed[start : start + _WINDOW]
            yield from zip(window, pool.map(look, window), strict=True)


@dataclass
class _Writer:
    """Shards in the making."""

    folder: Path
    labels: tuple[str, ...]
    shard_bytes: int
    shards: list[dict[str, Any]] = field(default_factory=list)
    _rows: list[tuple[Any, ...]] = field(default_factory=list)
    _tar: tarfile.TarFile | None = None
    _pictures: int = 0

    def add(self, sample: Sample, data: bytes, suffix: str, key: str) -> None:
        if self._tar is None:
            self._tar = tarfile.open(self._path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  closed when full
        name = f"{len(self._rows):09d}"
        offset = self._member(name + suffix, data)
        self._member(name + ".cls", str(sample.label).encode())
        label = self.labels[sample.label]
        self._rows.append((sample.id, label, key, self._path.name, offset, len(data)))
        self._pictures += 1
        if self._tar.offset >= self.shard_bytes:
            self._end_shard()

    def finish(self) -> None:
        if self._pictures:
            self._end_shard()
        with open(self.folder / INDEX, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([_COLUMNS, *sorted(self._rows)])

    def close(self) -> None:
        if self._tar is not None and self._tar.fileobj is not None:
            self._tar.fileobj.close()

    @property
    def _path(self) -> Path:
        return self.folder / f"{len(self.shards):06d}.tar"

    def _member(self, name: str, data: bytes) -> int:
        """Append a file; returns where its bytes begin."""
        assert self._tar is not None
        info = tarfile.TarInfo(name)  # undated and owned by nobody: equal pictures give equal shards
        info.size = len(data)
        begins = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(info, io.BytesIO(data))
        return begins

    def _end_shard(self) -> None:
        assert self._tar is not None
        path = self._path
        self._tar.close()
        facts = {"name": path.name, "pictures": self._pictures, "size_bytes": path.stat().st_size}
        self.shards.append({**facts, "sha256": sha256_file(path)})
        self._tar, self._pictures = None, 0
