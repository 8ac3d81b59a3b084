"""Labelled pictures on disk: finding them, checking each one before training begins, and splitting them for good.

Three layouts are read:
    flat      cat.0.jpg, dog.17.jpg, ...: the label is the file's own name up to its first dot
    folders   cat/anything.jpg, dog/...: the label is the folder below the data set's root
    table     a .csv or .tsv with the columns path and label, paths relative to the table
A fourth one, shards, is such a set packed into a few large files; see marten.shards.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from marten.errors import DataError, PictureError, UsageError
from marten.files import available_cpus
from modelspec import Preprocess

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tiff"})
_PARTS = frozenset({"train", "val", "valid", "validation", "test", "test1"})
"""Folders that part a set, and so are no classes."""
_FLAT_NAME = re.compile(r"(?P<label>[^.\s][^.]*)\.(?P<number>\d+)\.[A-Za-z]+")


@dataclass(frozen=True)
class Sample:
    """One labelled picture.

    Attributes:
        id: path relative to the data set's root, with forward slashes.
        path: where it lies.
        label: index into the data set's labels.
        key: sha256 of its content; empty until inspected.
        score: what a regression is to answer; None for a classifier's.
        votes: of people, behind the score; 0 where the table tells none.
        weight: how much its error counts in training; see marten.weighing.
        span: (offset, size in bytes) in `path` of a picture that lies in a shard; None where `path` is the picture.
    """

    id: str
    path: Path
    label: int
    key: str = ""
    score: float | None = None
    votes: float = 0.0
    weight: float = 1.0
    span: tuple[int, int] | None = None

    def source(self) -> Path | bytes:
        """What `Preprocess.read` takes: the picture's file, or its bytes out of a shard.

        Raises:
            PictureError: a shard that is gone or cut short.
        """
        if self.span is None:
            return self.path
        offset, size_bytes = self.span
        try:
            with open(self.path, "rb") as shard:
                shard.seek(offset)
                data = shard.read(size_bytes)
        except OSError as error:
            raise PictureError(404, f"cannot read the picture: {error}") from error
        if len(data) < size_bytes:
            raise PictureError(422, f"{self.path.name} is cut short")
        return data


@dataclass(frozen=True)
class PictureSet:
    """Labelled pictures in the order of their ids, and what was found beside them.

    Attributes:
        root: folder (or table) they were read from.
        layout: "flat", "folders", "table" or "shards".
        labels: class names, sorted; a sample's label is an index into them.
        samples: sorted by id.
        rejected: (id, reason) of each file that is no usable picture.
        decoded_for_px: shorter side that sharded pictures were decoded for; 0 where they are files as they were.
    """

    root: Path
    layout: str
    labels: tuple[str, ...]
    samples: tuple[Sample, ...]
    rejected: tuple[tuple[str, str], ...] = ()
    decoded_for_px: int = 0

    @property
    def name(self) -> str:
        """What the set is called: its folder or table, or the folder around one that is called train."""
        root = self.root.resolve()
        return root.parent.name if root.name == "train" else root.stem if root.is_file() else root.name

    @property
    def digest(self) -> str:
        """Hex sha256 over id, label and content of every sample; the same wherever the set lies."""
        targets = (self.labels[s.label] if s.score is None else repr(s.score) for s in self.samples)
        lines = (f"{s.id}\t{target}\t{s.key}\n" for s, target in zip(self.samples, targets, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def counts(self, samples: Iterable[Sample] | None = None) -> dict[str, int]:
        """How many samples each label has."""
        counted = Counter(s.label for s in (self.samples if samples is None else samples))
        return {name: counted[i] for i, name in enumerate(self.labels)}


def find_pictures(root: Path, labels: Sequence[str] | None = None) -> PictureSet:
    """List a data set without opening a picture. A folder holding only `train` (beside others) is read from there.

    Args:
        root: folder of one of the layouts, or a table.
        labels: the classes to expect, in the order of their indices; found and sorted when None.

    Raises:
        DataError: nothing there, two layouts mixed, fewer than two classes, or a class that was not expected.
    """
    root = Path(root)
    if (root / "shards.json").is_file():
        from marten.shards import find_shards  # here, because it makes what this module defines

        return find_shards(root, labels)
    if root.is_file() and root.suffix.lower() in (".csv", ".tsv"):
        try:
            layout, found, rejected = "table", *_read_table(root)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{root} is no table in UTF-8: {error}") from error
    elif root.is_dir():
        root = _training_folder(root)
        layout, found, rejected = _read_folder(root)
    else:
        raise DataError(f"no data set at {root}: give a folder of pictures or a .csv with the columns path and label")
    names = sorted({label for _, _, label in found})
    if layout == "folders" and "train" in names and len(_PARTS.intersection(names)) > 1:  # alone it may be a railway's
        others = ", ".join(name for name in names if name != "train")
        raise DataError(f"{root} holds a folder train beside {others}: name the one to learn from, {root / 'train'}")
    if not found:
        raise DataError(
            f"no labelled picture in {root}: expected cat.0.jpg, dog.0.jpg, …, or one folder per class"
            f" ({len(rejected)} other files{_first(rejected)})"
        )
    if labels is not None and not set(names) <= set(labels):
        raise DataError(f"{root} holds the classes {names}, but the model knows {list(labels)}")
    if labels is None and len(names) < 2:
        raise DataError(f"{root} holds one class only, {names[0]!r}: a classifier needs at least two")
    index = {name: i for i, name in enumerate(labels or names)}
    samples = sorted((Sample(id_, path, index[label]) for id_, path, label in found), key=lambda s: s.id)
    return PictureSet(root, layout, tuple(index), tuple(samples), tuple(sorted(rejected)))


def inspect(
    pictures: PictureSet,
    preprocess: Preprocess,
    on_bad: str = "skip",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PictureSet:
    """Decode every picture once as training will, and digest its content; a sharded one was when it was packed.

    Args:
        pictures: from `find_pictures`.
        preprocess: of the model to be trained.
        on_bad: "skip" the unreadable and foreign files, listing them, or "refuse" to go on.
        progress: called with (done, total).

    Returns:
        The set without the unreadable ones, each sample with its `key`.

    Raises:
        DataError: something was rejected and `on_bad` is "refuse", or fewer than two classes are left; or shards that
            were decoded for another size.
    """
    if pictures.decoded_for_px not in (0, preprocess.min_size_px):
        raise DataError(
            f"{pictures.root} was decoded for {pictures.decoded_for_px} pixels, and this network reads"
            f" {preprocess.min_size_px}: write the shards for it with scripts/data shards --decoded"
        )

    def look(sample: Sample) -> Sample | tuple[str, str]:
        try:
            data = sample.path.read_bytes()
            preprocess.read(data)
        except OSError as error:
            return sample.id, error.strerror or str(error)
        except PictureError as error:
            return sample.id, str(error)
        return replace(sample, key=hashlib.sha256(data).hexdigest())

    good: list[Sample] = []
    rejected = list(pictures.rejected)
    packed = pictures.layout == "shards"
    with ThreadPoolExecutor(available_cpus()) as pool:
        seen_samples = pictures.samples if packed else pool.map(look, pictures.samples)
        for done, seen in enumerate(seen_samples, 1):
            if isinstance(seen, Sample):
                good.append(seen)
            else:
                rejected.append(seen)
            progress(done, len(pictures.samples))
    if rejected and on_bad == "refuse":
        raise DataError(f"{len(rejected)} files in {pictures.root} are not usable pictures{_first(rejected)}")
    if len({s.label for s in good}) < 2:
        raise DataError(f"fewer than two classes of readable pictures in {pictures.root}{_first(rejected)}")
    return replace(pictures, samples=tuple(good), rejected=tuple(sorted(rejected)))


def split(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Part the samples into training and validation: stratified, seeded, the same on every machine.

    A sample's place depends on its content and the seed alone, neither on its name nor on the listing; identical
    pictures stay together, so that none is both trained on and validated with.

    Args:
        samples: with keys (from `inspect`), or without, and then ids take their place.
        fraction: share of each class for validation, 0 <= fraction < 1.
        seed: another seed, another split.

    Returns:
        (training, validation), each sorted by id. With a fraction above 0, a class of at least two distinct pictures
        has at least one in each part.

    Raises:
        UsageError: the fraction is out of range.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"--validation_split must lie in [0, 1), found {fraction}")
    chosen: set[str] = set()
    for label in {s.label for s in samples}:
        sizes = Counter(s.key or s.id for s in samples if s.label == label)
        ranked = sorted(sizes, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
        wanted = fraction * sizes.total()
        taken = 0
        for key in ranked[: len(ranked) - 1]:
            if taken and taken + sizes[key] / 2 > wanted:
                break
            if fraction > 0:
                chosen.add(key)
                taken += sizes[key]
    training = [s for s in samples if (s.key or s.id) not in chosen]
    validation = [s for s in samples if (s.key or s.id) in chosen]
    return sorted(training, key=lambda s: s.id), sorted(validation, key=lambda s: s.id)


def split_table(labels: Sequence[str], training: Sequence[Sample], validation: Sequence[Sample]) -> str:
    """A split as CSV text with the columns path, label and split."""
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(("path", "label", "split"))
    for part, samples in (("train", training), ("validation", validation)):
        writer.writerows((sample.id, labels[sample.label], part) for sample in samples)
    return rows.getvalue()


def _training_folder(root: Path) -> Path:
    """`root/train` when the pictures lie there, else `root`."""
    train = root / "train"
    others = [p for p in root.iterdir() if p.is_dir() and p.name not in _PARTS and not _is_litter(p.name)]
    loose = any(p.is_file() and p.suffix.lower() in SUFFIXES for p in root.iterdir())
    return train if train.is_dir() and not others and not loose else root


def _is_litter(name: str) -> bool:
    """Whether a folder is what a Mac or an editor leaves behind."""
    return name.startswith(".") or name == "__MACOSX"


_Found = list[tuple[str, Path, str]]
_Rejected = list[tuple[str, str]]


def _read_folder(root: Path) -> tuple[str, _Found, _Rejected]:
    flat, folders = [], []
    rejected: _Rejected = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not _is_litter(name))
        for name in sorted(files):
            path = Path(folder, name)
            id_ = path.relative_to(root).as_posix()
            if path.suffix.lower() not in SUFFIXES or name.startswith("."):
                rejected.append((id_, "not a picture by its name"))
            elif Path(folder) != root:
                folders.append((id_, path, id_.split("/", 1)[0]))
            elif match := _FLAT_NAME.fullmatch(name):
                flat.append((id_, path, match["label"]))
            else:
                rejected.append((id_, "no label in its name: expected label.number.jpg"))
    if flat and folders:
        raise DataError(
            f"{root} mixes labelled files ({flat[0][0]}) with class folders ({folders[0][0]}): use one layout"
        )
    return ("flat", flat, rejected) if flat else ("folders", folders, rejected)


def _read_table(table: Path) -> tuple[_Found, _Rejected]:
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
        if not {"path", "label"} <= set(reader.fieldnames or ()):
            raise DataError(f"{table} has the columns {reader.fieldnames}: it needs path and label")
        found: _Found = []
        rejected: _Rejected = []
        seen: set[str] = set()
        for line, row in enumerate(reader, 2):
            id_, label = (row["path"] or "").strip(), (row["label"] or "").strip()
            if not id_ or not label:
                rejected.append((id_ or f"line {line}", "no path or no label in the table"))
            elif id_ in seen:
                rejected.append((id_, f"listed again in line {line}"))
            elif not (table.parent / id_).is_file():
                rejected.append((id_, "no such file"))
            else:
                seen.add(id_)
                found.append((id_, table.parent / id_, label))
    return found, rejected


def _first(rejected: Sequence[tuple[str, str]]) -> str:
    return f"; the first: {rejected[0][0]}, {rejected[0][1]}" if rejected else ""
