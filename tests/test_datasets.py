"""Finding, checking and splitting pictures."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marten.datasets import Sample, find_pictures, inspect, split
from marten.errors import DataError, UsageError
from modelspec import Preprocess
from tests.pictures import draw, encode


def fill(folder: Path, names: list[str], seed: int = 0) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw(seed + number, (40, 30)), "JPEG"))


FLAT = [f"{label}.{i}.jpg" for label in ("cat", "dog") for i in range(6)]


def test_flat_labels_come_from_the_file_name_alone(tmp_path: Path) -> None:
    # B0-07: 'cat' anywhere in the path made every picture a cat
    folder = tmp_path / "cat_dog" / "education"
    fill(folder, FLAT)
    pictures = find_pictures(folder)
    assert pictures.labels == ("cat", "dog")
    assert pictures.counts() == {"cat": 6, "dog": 6}
    assert [s.id for s in pictures.samples] == sorted(FLAT)


def test_stray_files_are_listed_and_are_no_cats(tmp_path: Path) -> None:
    # B0-10, B1-02: .DS_Store became a cat
    fill(tmp_path, FLAT)
    for name in (".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_text("x")
    fill(tmp_path, ["holiday.jpg"])
    pictures = find_pictures(tmp_path)
    assert len(pictures.samples) == 12
    assert [id_ for id_, _ in pictures.rejected] == [".DS_Store", "Thumbs.db", "holiday.jpg", "notes.txt"]


def test_class_folders_and_tables(tmp_path: Path) -> None:
    fill(tmp_path / "folders", ["ash/1.jpg", "ash/deep/2.jpg", "oak/1.png", "yew/3.JPG"])
    pictures = find_pictures(tmp_path / "folders")
    assert pictures.layout == "folders"
    assert pictures.counts() == {"ash": 2, "oak": 1, "yew": 1}
    table = tmp_path / "trees.csv"
    table.write_text("path,label\nfolders/ash/1.jpg,a\nfolders/oak/1.png,o\nfolders/oak/1.png,o\nnowhere.jpg,a\n,a\n")
    pictures = find_pictures(table)
    assert pictures.counts() == {"a": 1, "o": 1}
    assert len(pictures.rejected) == 3


def test_a_folder_of_train_and_test1_is_read_from_train(tmp_path: Path) -> None:
    fill(tmp_path / "train", FLAT)
    fill(tmp_path / "test1", ["1.jpg", "2.jpg"])
    assert find_pictures(tmp_path).root == tmp_path / "train"


@pytest.mark.parametrize("litter", [".ipynb_checkpoints", "__MACOSX", "validation"])
def test_litter_beside_train_makes_no_classes_of_train_and_test1(tmp_path: Path, litter: str) -> None:
    # with a hidden folder beside them, "train" and "test1" were the two classes
    fill(tmp_path / "train", FLAT)
    fill(tmp_path / "test1", ["1.jpg", "2.jpg"])
    fill(tmp_path / litter, ["._cat.0.jpg"])
    fill(tmp_path / "train" / litter, ["._cat.0.jpg"] if litter != "validation" else [])
    assert find_pictures(tmp_path).labels == ("cat", "dog")
    fill(tmp_path / "mine", ["1.jpg"])
    with pytest.raises(DataError, match="name the one to learn from"):
        find_pictures(tmp_path)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], "no labelled picture"),
        (["cat.1.jpg", "cat.2.jpg"], "one class only"),
        (["cat.1.jpg", "dog/1.jpg"], "mixes"),
        (["beach.jpg"], "no labelled picture"),
    ],
)
def test_unusable_sets_are_refused_with_a_reason(tmp_path: Path, names: list[str], told: str) -> None:
    fill(tmp_path, names)
    with pytest.raises(DataError, match=told):
        find_pictures(tmp_path)


def test_a_missing_folder_and_a_table_without_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set at"):
        find_pictures(tmp_path / "nowhere")
    (tmp_path / "bad.csv").write_text("file,class\n")
    with pytest.raises(DataError, match="needs path and label"):
        find_pictures(tmp_path / "bad.csv")
    (tmp_path / "latin.csv").write_bytes("path,label\nkätzchen.jpg,cat\n".encode("latin-1"))
    with pytest.raises(DataError, match="no table in UTF-8"):  # was a traceback
        find_pictures(tmp_path / "latin.csv")


def test_unreadable_pictures_are_found_before_training(tmp_path: Path) -> None:
    # B0-25: any unreadable picture killed the run
    fill(tmp_path, FLAT)
    (tmp_path / "cat.9.jpg").write_bytes(b"\xff\xd8\xff but no picture")
    whole = (tmp_path / "dog.0.jpg").read_bytes()
    (tmp_path / "dog.9.jpg").write_bytes(whole[: len(whole) // 2])
    found = find_pictures(tmp_path)
    seen: list[int] = []
    pictures = inspect(found, Preprocess(), progress=lambda done, total: seen.append(done))
    assert seen == list(range(1, 15))
    assert [id_ for id_, _ in pictures.rejected] == ["cat.9.jpg", "dog.9.jpg"]
    assert all(len(s.key) == 64 for s in pictures.samples)
    with pytest.raises(DataError, match="2 files"):
        inspect(found, Preprocess(), on_bad="refuse")


def test_the_digest_is_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    fill(tmp_path / "one", FLAT)
    fill(tmp_path / "two", FLAT)
    one, two = (inspect(find_pictures(tmp_path / name), Preprocess()) for name in ("one", "two"))
    assert one.digest == two.digest
    (tmp_path / "two" / "cat.0.jpg").write_bytes(encode(draw(99), "JPEG"))
    assert inspect(find_pictures(tmp_path / "two"), Preprocess()).digest != one.digest


def samples_of(sizes: list[int], root: str = "/a") -> list[Sample]:
    return [
        Sample(f"{label}.{i}.jpg", Path(root, f"{label}.{i}.jpg"), label, key=f"{label}-{i}")
        for label, size in enumerate(sizes)
        for i in range(size)
    ]


@given(
    sizes=st.lists(st.integers(2, 60), min_size=2, max_size=4),
    fraction=st.floats(0, 0.95),
    seed=st.integers(0, 2**31),
    shuffled=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_splits_are_stratified_disjoint_and_blind_to_order(
    sizes: list[int], fraction: float, seed: int, shuffled: random.Random
) -> None:
    # B0-08, B0-09, B1-09
    samples = samples_of(sizes)
    training, validation = split(samples, fraction, seed)
    assert sorted(s.id for s in training + validation) == sorted(s.id for s in samples)
    for label, size in enumerate(sizes):
        held = sum(s.label == label for s in validation)
        if fraction == 0:
            assert held == 0
        else:
            assert 1 <= held <= size - 1
            assert abs(held - fraction * size) <= 1
    again = samples_of(sizes, root="/elsewhere")
    shuffled.shuffle(again)
    assert [s.id for s in split(again, fraction, seed)[1]] == [s.id for s in validation]


def test_another_seed_gives_another_split() -> None:
    samples = samples_of([50, 50])
    assert split(samples, 0.2, 0) != split(samples, 0.2, 1)


def test_identical_pictures_stay_on_one_side() -> None:
    samples = [Sample(f"{i}.jpg", Path(f"{i}.jpg"), i % 2, key=f"{i % 2}-{i // 6}") for i in range(120)]
    training, validation = split(samples, 0.3, 5)
    assert not {s.key for s in training} & {s.key for s in validation}


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 3.0])
def test_impossible_fractions_are_misuse(fraction: float) -> None:
    with pytest.raises(UsageError, match="validation_split"):
        split(samples_of([3, 3]), fraction, 0)


def test_real_pictures_are_all_found(data_dir: Path) -> None:
    pictures = find_pictures(data_dir / "dogs-vs-cats")
    assert pictures.counts() == {"cat": 1001, "dog": 1001}
    training, validation = split(pictures.samples, 0.1, 0)
    assert (len(training), len(validation)) == (1802, 200)
