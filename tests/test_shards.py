"""A set packed into shards trains to the same bits as its files, and says so where it cannot."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from marten.datasets import find_pictures, inspect, split
from marten.errors import DataError
from marten.files import ROOT
from marten.getting import check
from marten.shards import FACTS, INDEX, check_shards, find_shards, read_facts, write_shards
from modelspec import Preprocess
from tests.runs import draw_set, result, run_once


@pytest.fixture(scope="module")
def large_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures large enough that training decodes them at a reduced scale."""
    folder = draw_set(tmp_path_factory.mktemp("large"), 8)
    for path in folder.iterdir():
        with Image.open(path) as small:
            small.resize((1300, 1000)).save(path)
    return folder


@pytest.mark.parametrize("decoded", [False, True])
def test_shards_train_to_the_same_bits_as_the_files(
    drawn_set: Path, whole_run: Path, tmp_path: Path, decoded: bool
) -> None:
    packed = write_shards(find_pictures(drawn_set), tmp_path / "packed", Preprocess() if decoded else None, 0.02)
    assert len(read_facts(packed.root)["shards"]) > 1
    assert run_once(packed.root, tmp_path / "out") == 0
    assert result(tmp_path / "out") == result(whole_run)
    card = json.loads((tmp_path / "out" / "model.json").read_text())
    assert card["data"]["layout"] == "shards"
    assert card["data"]["digest"] == json.loads((whole_run / "model.json").read_text())["data"]["digest"]


def test_decoded_shards_hold_the_pixels_that_training_reads(large_set: Path, tmp_path: Path) -> None:
    preprocess = Preprocess(size_px=(96, 96))
    files = inspect(find_pictures(large_set), preprocess)
    packed = inspect(write_shards(files, tmp_path / "packed", preprocess), preprocess)
    assert packed.digest == files.digest
    for ours, theirs in zip(packed.samples, files.samples, strict=True):
        picture = preprocess.read(ours.source())
        assert picture.size == (325, 250), "not decoded at a reduced scale"
        assert picture.tobytes() == preprocess.read(theirs.source()).tobytes()
    halves = [[s.id for s in part] for part in split(packed.samples, 0.25, 1)]
    assert halves == [[s.id for s in part] for part in split(files.samples, 0.25, 1)]
    with pytest.raises(DataError, match=r"decoded for 192 pixels, and this network reads 448: write the shards"):
        inspect(packed, Preprocess())


def test_equal_pictures_give_equal_shards_and_bad_ones_are_named(drawn_set: Path, tmp_path: Path) -> None:
    data = draw_set(tmp_path / "data", 6)
    (data / "cat.7.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (data / "notes.txt").write_text("not a picture")
    first = write_shards(find_pictures(data), tmp_path / "first")
    second = write_shards(find_pictures(data), tmp_path / "second")
    assert read_facts(first.root)["shards"] == read_facts(second.root)["shards"]
    assert (first.root / INDEX).read_bytes() == (second.root / INDEX).read_bytes()
    assert [id_ for id_, _ in first.rejected] == ["cat.7.jpg", "notes.txt"]
    assert len(first.samples) == 6
    with pytest.raises(DataError, match=r"2 files in .* are not usable"):
        inspect(first, Preprocess(), on_bad="refuse")
    with pytest.raises(DataError, match="holds something already"):
        write_shards(find_pictures(data), first.root)
    with pytest.raises(DataError, match="sharded already"):
        write_shards(first, tmp_path / "third")
    with pytest.raises(DataError, match=r"holds the classes \['cat', 'dog'\], but the model knows \['dog', 'owl'\]"):
        find_pictures(first.root, labels=("dog", "owl"))
    owls = find_pictures(first.root, labels=("owl", "dog", "cat"))
    assert {owls.labels[s.label] for s in owls.samples if s.id.startswith("cat")} == {"cat"}


def test_a_shard_that_is_missing_cut_or_changed_is_told(drawn_set: Path, tmp_path: Path) -> None:
    packed = write_shards(find_pictures(drawn_set), tmp_path / "packed", shard_mb=0.01)
    check_shards(packed.root)
    shard = packed.root / "000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    with pytest.raises(DataError, match=r"000000.tar is damaged: its sha256"):
        check(packed.root)
    shard.write_bytes(whole[:-512])
    with pytest.raises(DataError, match="bytes long, not"):
        find_pictures(packed.root)
    shard.unlink()
    with pytest.raises(DataError, match=r"000000.tar is missing: bring the whole set again"):
        find_pictures(packed.root)
    shard.write_bytes(whole)
    (packed.root / INDEX).write_text("path,label\na,cat\n")
    with pytest.raises(DataError, match="no index of a sharded set"):
        find_pictures(packed.root)
    (packed.root / FACTS).write_text("{}")
    with pytest.raises(DataError, match="not of the format"):
        find_pictures(packed.root)


def test_a_shard_that_goes_away_amid_a_run_is_a_reason_and_no_crash(drawn_set: Path, tmp_path: Path) -> None:
    from marten.batches import Pictures

    packed = write_shards(find_pictures(drawn_set), tmp_path / "packed")
    pictures = Pictures(packed.samples, Preprocess())
    (packed.root / "000000.tar").write_bytes(b"")
    assert "could be read before training began, now it cannot: 000000.tar is cut short" in str(pictures[0, 0])
    (packed.root / "000000.tar").unlink()
    assert "cannot read the picture" in str(pictures[0, 0])


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_package_webdataset_streams_them(drawn_set: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="needs the package webdataset: requirements-dev.txt")
    packed = write_shards(find_pictures(drawn_set), tmp_path / "packed", shard_mb=0.02)
    shards = sorted(map(str, packed.root.glob("*.tar")))
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls"))
    with open(packed.root / INDEX, newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["shard"], int(row["offset"])))
    assert len(found) == len(rows) == 24
    for (pixels_hwc, label), row in zip(found, rows, strict=True):
        assert pixels_hwc.shape == (50, 60, 3)
        assert packed.labels[label] == row["label"]
        with Image.open(drawn_set / row["path"]) as picture:
            assert picture.convert("RGB").tobytes() == pixels_hwc.tobytes()


def test_the_command_packs_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    data = draw_set(tmp_path / "data", 6)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "data"), "shards", str(data), *words]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VIRTUAL_ENV": sys.prefix})

    done = run("--into", str(tmp_path / "packed"), "--decoded", "resnet18")
    assert (done.returncode, done.stderr) == (0, "")
    assert "6 pictures in 1 shards" in done.stdout
    assert find_shards(tmp_path / "packed").decoded_for_px == 512
    (data / "cat.0.jpg").write_bytes(b"damaged")
    again = run("--into", str(tmp_path / "again"))
    assert again.returncode == 1
    assert "not packed: cat.0.jpg: not a picture in an allowed format" in again.stdout
    assert run("--into", str(tmp_path / "x"), "--shard_mb", "0").returncode == 2
