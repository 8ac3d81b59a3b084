"""Data sets are unpacked whole or not at all, and told about truthfully."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from marten.errors import DataError
from marten.files import ROOT
from marten.getting import check, fetch_kaggle, fetch_pets, unpack
from tests.pictures import draw, encode


def zipped(path: Path, names: list[str], seed: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for number, name in enumerate(names):
            file.writestr(name, encode(draw(seed + number, (40, 30)), "JPEG"))
    return path


def test_a_zip_in_a_zip_as_kaggle_packs_it(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "train.zip", ["train/cat.0.jpg", "train/dog.0.jpg"])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as outer:
        outer.write(inner, "train.zip")
    pictures, told = check(unpack(tmp_path / "all.zip", tmp_path / "data"))
    assert pictures.counts() == {"cat": 1, "dog": 1}
    assert told == []
    assert not list((tmp_path / "data").rglob("*.zip"))


def test_a_tar_that_reaches_outside_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as file:
        info = tarfile.TarInfo("../evil.txt")
        info.size = 1
        file.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(tmp_path / "evil.tar", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "evil.txt").exists()


def test_a_truncated_zip_leaves_nothing_behind(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "a.zip", ["cat.0.jpg", "dog.0.jpg"]).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError):
        unpack(tmp_path / "cut.zip", tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "cut.zip"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", ["cat.0.jpg"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="holds something already"):
        unpack(archive, tmp_path / "data")


def test_a_zip_with_a_password_is_one_line(tmp_path: Path) -> None:
    # was a RuntimeError's traceback
    data = bytearray(zipped(tmp_path / "a.zip", ["cat.0.jpg"]).read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(header) + flags] |= 1  # "encrypted"
    (tmp_path / "locked.zip").write_bytes(data)
    with pytest.raises(DataError, match="password"):
        unpack(tmp_path / "locked.zip", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_places_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", ["cat.0.jpg"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="no archive at nowhere"):
        unpack(Path("nowhere.zip"), tmp_path / "data")
    with pytest.raises(DataError, match="neither a zip nor a tar"):
        unpack(tmp_path / "file", tmp_path / "data")
    with pytest.raises(DataError, match="holds something already"):
        unpack(archive, tmp_path / "file")
    with pytest.raises(DataError, match="cannot write"):
        unpack(archive, tmp_path / "file" / "data")


def test_kaggle_is_not_asked_for_what_has_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 800 MB were fetched first
    (tmp_path / "mine.txt").write_text("x")
    monkeypatch.setattr("marten.getting.importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("marten.getting.subprocess.run", None)
    with pytest.raises(DataError, match="holds something already"):
        fetch_kaggle(tmp_path)


def test_copies_and_contradictions_are_told(tmp_path: Path) -> None:
    for name, seed in (("cat.0.jpg", 0), ("cat.1.jpg", 0), ("dog.0.jpg", 0), ("dog.1.jpg", 1)):
        (tmp_path / name).write_bytes(encode(draw(seed, (40, 30)), "JPEG"))
    _, told = check(tmp_path)
    assert told == [
        "2 pictures are copies of others, byte for byte; a split keeps copies together",
        "1 pictures stand under two labels at once: remove one of each pair",
    ]


def test_without_a_network_it_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.oxford_iiit_pet.download_and_extract_archive", no_network)
    with pytest.raises(DataError, match=r"put images\.tar\.gz and annotations\.tar\.gz"):
        fetch_pets(tmp_path / "data")


def test_the_command_checks_and_exits_1_on_damage(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", ["cat.0.jpg", "dog.0.jpg"])
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("dog.1.jpg", b"\xff\xd8\xff damaged")
    words = [
        sys.executable,
        str(ROOT / "scripts" / "data"),
        "zip",
        str(archive),
        "--data_dir",
        str(tmp_path / "data"),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "not used: dog.1.jpg: a damaged JPEG picture" in done.stdout
