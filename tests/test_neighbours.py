"""Copies are found whatever was done to them, unrelated pictures are not, and the table says what is wrong."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageEnhance, ImageFilter

from marten.datasets import Sample, find_pictures
from marten.files import ROOT
from marten.neighbours import difference_hash, find_pairs, pairs_table
from tests.pictures import draw, encode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve different pictures, two of them again: number 0 recompressed as a dog's, 1 at half its size."""
    for number in range(12):
        picture = draw(number, (200, 150))
        label = "dog" if number % 2 else "cat"
        (tmp_path / f"{label}.{number}.png").write_bytes(encode(picture, "PNG"))
        if number == 0:
            (tmp_path / "dog.100.jpg").write_bytes(encode(picture, "JPEG", quality=40))
        if number == 1:
            (tmp_path / "dog.101.png").write_bytes(encode(picture.resize((100, 75)), "PNG"))
    return tmp_path


def test_copies_are_found_and_nothing_else(folder: Path) -> None:
    pairs = find_pairs(find_pictures(folder).samples)
    assert {(p.first.id, p.second.id) for p in pairs} == {("cat.0.png", "dog.100.jpg"), ("dog.1.png", "dog.101.png")}
    assert [p.bits for p in pairs] == sorted(p.bits for p in pairs)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.filter(ImageFilter.GaussianBlur(1)),
        lambda p: ImageEnhance.Brightness(p).enhance(0.8),
        lambda p: p.convert("L"),
        lambda p: p.resize((80, 200)),
    ],
    ids=["blurred", "darker", "grey", "squashed"],
)
def test_a_changed_copy_stays_close(change: object) -> None:
    for seed in range(5):
        first, second = draw(seed, (200, 150)), change(draw(seed, (200, 150)))  # type: ignore[operator]
        one, two = difference_hash(first), difference_hash(second)
        assert one is not None
        assert two is not None
        assert sum(bin(a ^ b).count("1") for a, b in zip(one.tolist(), two.tolist(), strict=True)) <= 28


def test_empty_pictures_are_not_all_copies_of_each_other(tmp_path: Path) -> None:
    samples = []
    for number, colour in enumerate(((0, 0, 0), (250, 250, 250), (9, 90, 200))):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (50, 50), colour).save(path)
        samples.append(Sample(path.name, path, 0))
    assert find_pairs(samples) == []


def test_the_table_says_what_is_wrong_with_a_pair(folder: Path) -> None:
    pictures = find_pictures(folder)
    parts = {s.id: "validation" if s.id == "dog.101.png" else "train" for s in pictures.samples}
    rows = {
        r["first"]: r
        for r in csv.DictReader(io.StringIO(pairs_table(find_pairs(pictures.samples), pictures.labels, parts)))
    }
    assert rows["cat.0.png"]["problem"] == "labels"
    assert rows["dog.1.png"]["problem"] == "across"
    assert rows["dog.1.png"]["second_part"] == "validation"


def test_the_command_lists_them(folder: Path, tmp_path: Path) -> None:
    words = ["duplicates", str(folder), "--out", str(tmp_path / "pairs.csv")]
    told = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "data"), *words], capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 0, told.stderr
    assert "2 pairs" in told.stdout
    with open(tmp_path / "pairs.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2
