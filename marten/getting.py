"""Bringing a data set here: from Kaggle, from torchvision, from an archive, unpacked once and checked."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from marten.datasets import PictureSet, find_pictures, inspect
from marten.errors import DataError
from marten.shards import check_shards
from modelspec import Preprocess

KAGGLE_SET = "dogs-vs-cats"
_PETS_PAGE = "https://www.robots.ox.ac.uk/~vgg/data/pets/"


def unpack(archive: Path, into: Path) -> Path:
    """Unpack a zip or tar, whole or not at all, and any zip lying in it (Kaggle's train.zip, test1.zip).

    Returns:
        `into`.

    Raises:
        DataError: no archive, a damaged one, one that reaches outside its folder, or `into` exists already.
    """
    archive, into = Path(archive), Path(into)
    if not archive.is_file():
        raise DataError(f"no archive at {archive}")
    _refuse_to_overwrite(into)
    with _scratch(into) as scratch:
        room = Path(scratch, "room")
        _unpack_one(archive, room)
        for inner in sorted(room.rglob("*.zip")):
            _unpack_one(inner, inner.parent)
            inner.unlink()
        if into.exists():
            into.rmdir()
        os.replace(room, into)
    return into


def _refuse_to_overwrite(into: Path) -> None:
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise DataError(f"{into} holds something already: remove it, or choose another folder with --data_dir")


def _scratch(into: Path) -> tempfile.TemporaryDirectory[str]:
    """A private folder beside `into`, on its disk: what is whole can be put in place in one step."""
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{into.name}.", dir=into.parent)
    except OSError as error:
        raise DataError(f"cannot write into {into.parent}: {error.strerror}") from error


def _unpack_one(archive: Path, into: Path) -> None:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                damaged = file.testzip()
                if damaged:
                    raise DataError(f"{archive}: {damaged} is damaged: fetch the archive again")
                file.extractall(into)  # zipfile strips absolute and upward paths itself
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as file:
                file.extractall(into, filter="data")
        else:
            raise DataError(f"{archive} is neither a zip nor a tar")
    # RuntimeError: a password is needed; NotImplementedError: a compression that Python lacks
    except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from error


def fetch_kaggle(into: Path, archive: Path | None = None) -> Path:
    """The 25,000 labelled pictures of Dogs vs. Cats, from a zip already here or with the user's Kaggle account.

    Raises:
        DataError: no zip, and no account or no network; says what to fetch and where to put it.
    """
    if archive is not None:
        return unpack(archive, into)
    by_hand = (
        f"download dogs-vs-cats.zip from https://www.kaggle.com/c/{KAGGLE_SET}/data and run"
        " scripts/data kaggle --archive dogs-vs-cats.zip"
    )
    if importlib.util.find_spec("kaggle") is None:
        raise DataError(f"the kaggle package is not installed: pip install kaggle, or {by_hand}")
    _refuse_to_overwrite(into)  # before 800 MB are fetched
    with _scratch(into) as scratch:
        words = [sys.executable, "-m", "kaggle", "competitions", "download", "-c", KAGGLE_SET, "-p", scratch]
        done = subprocess.run(words, text=True, capture_output=True)
        found = list(Path(scratch).glob("*.zip"))
        if done.returncode or not found:
            said = (done.stderr or done.stdout).strip().splitlines() or ["no answer"]
            raise DataError(f"Kaggle gave nothing ({said[-1][:200]}): {by_hand}")
        return unpack(found[0], into)


def fetch_pets(into: Path) -> Path:
    """The 7,349 Oxford-IIIT pets as two class folders, cat and dog; no account is needed. About 800 MB.

    Raises:
        DataError: no network; says what to fetch and where to put it.
    """
    from torchvision.datasets import OxfordIIITPet

    store = into.with_name(into.name + ".download")
    sets = []
    for part in ("trainval", "test"):
        try:
            sets.append(OxfordIIITPet(str(store), split=part, target_types="binary-category", download=True))
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"the Oxford pets cannot be fetched ({getattr(error, 'reason', error)}): put images.tar.gz and"
                f" annotations.tar.gz of {_PETS_PAGE} into {store / 'oxford-iiit-pet'} and run this again"
            ) from error
    for pets in sets:
        for image, label in zip(pets._images, pets._bin_labels, strict=True):
            folder = into / pets.bin_classes[label].lower()
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / Path(image).name
            if not target.exists():
                shutil.copyfile(image, target)
    return into


def check(root: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[PictureSet, list[str]]:
    """Read every picture of a data set.

    Returns:
        (the readable pictures, what is worth knowing about them in one line each).

    Raises:
        DataError: nothing that can be trained on.
    """
    pictures = find_pictures(root)
    if pictures.layout == "shards":
        check_shards(root, progress)
    else:
        pictures = inspect(pictures, Preprocess(), progress=progress)
    told = []
    counts = pictures.counts()
    if max(counts.values()) > 5 * max(min(counts.values()), 1):
        told.append("the classes are far from even: accuracy alone will flatter the largest")
    copies = Counter(s.key for s in pictures.samples)
    again = sum(count - 1 for count in copies.values())
    if again:
        told.append(f"{again} pictures are copies of others, byte for byte; a split keeps copies together")
    labels_of: dict[str, set[int]] = {}
    for sample in pictures.samples:
        labels_of.setdefault(sample.key, set()).add(sample.label)
    torn = sum(len(labels) > 1 for labels in labels_of.values())
    if torn:
        told.append(f"{torn} pictures stand under two labels at once: remove one of each pair")
    return pictures, told
