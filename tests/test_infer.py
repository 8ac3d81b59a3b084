"""Many pictures become a table: every source alike, sharded, resumed, with bad files named and none in the way."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from marten.errors import DataError, UsageError
from marten.files import ROOT
from marten.inference import Row, Table, ask, header, merge
from marten.pictures import find_sources
from marten.predict import predict
from marten.weights import load_model
from tests.pictures import draw, encode

COUNT = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("test1")
    for number in range(1, COUNT + 1):
        (folder / f"{number}.jpg").write_bytes(encode(draw(number, (40, 30)), "JPEG"))
    (folder / "7.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (folder / "9.jpg").write_bytes((folder / "9.jpg").read_bytes()[:300])
    (folder / "notes.md").write_text("no picture")
    return folder


def infer(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "infer"), *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def table(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_s0_19_a_folder_becomes_dog_probs(folder: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model()
    done = infer(folder, "--model_path", model, "--device", "cpu", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Checking dogness of 23 images." in done.stdout
    assert "Wrote dog_probs.csv" in done.stdout
    rows = table(tmp_path / "dog_probs.csv")
    good = [str(n) for n in range(1, COUNT + 1) if n not in (7, 9)]
    assert rows[0] == ["fileid", "prob"]
    assert [row[0] for row in rows[1:]] == good
    network, card = load_model(model)
    expected = predict(network, card.spec, [folder / f"{n}.jpg" for n in good], topk=2)
    for row, answer in zip(rows[1:], expected, strict=True):
        assert answer.answer is not None
        assert float(row[1]) == pytest.approx(answer.answer["dog"], abs=2e-6)
    bad = table(tmp_path / "dog_probs.bad.csv")
    assert [row[0] for row in bad] == ["fileid", "7", "9"]
    assert all(row[1] for row in bad)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dog_probs.bad.csv", "dog_probs.csv"]


def test_zip_list_and_folder_say_the_same(folder: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "test1.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"test1/{path.name}")
        archive.writestr("__MACOSX/test1/._1.jpg", "litter")
    names = sorted(p.name for p in folder.glob("*.jpg"))
    (folder / "list.txt").write_text("\n".join(names))
    for source, output in ((folder, "a"), (tmp_path / "test1.zip", "b"), (folder / "list.txt", "c")):
        words = ("--model_path", tiny_model(), "--format", "all", "--device", "cpu", "--output", f"{output}.csv")
        assert infer(source, *words, folder=tmp_path).returncode == 0
    (folder / "list.txt").unlink()
    a, b, c = (table(tmp_path / f"{name}.csv") for name in "abc")
    assert a == b == c
    assert a[0] == ["fileid", "cat", "dog"]
    assert all(float(row[1]) + float(row[2]) == pytest.approx(1, abs=2e-6) for row in a[1:])


def test_shards_merge_into_the_whole(folder: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    words = ("--model_path", tiny_model(), "--format", "kaggle", "--device", "cpu")
    assert infer(folder, *words, "--output", "whole.csv", folder=tmp_path).returncode == 0
    for number in (1, 2, 3):
        out = f"part-{number}.csv"
        assert infer(folder, *words, "--shard", f"{number}/3", "--output", out, folder=tmp_path).returncode == 0
    parts = sorted(p for p in tmp_path.glob("part-?.csv"))
    merged = infer("--merge", *parts, "--output", "merged.csv", folder=tmp_path)
    assert merged.returncode == 0, merged.stderr
    whole = table(tmp_path / "whole.csv")
    assert whole[0] == ["id", "label"]
    assert [row[0] for row in whole[1:]] == [str(n) for n in range(1, COUNT + 1)]
    assert {row[0]: row[1] for row in whole}["7"] == "0.500000"
    for ours, theirs in zip(table(tmp_path / "merged.csv")[1:], whole[1:], strict=True):
        assert ours[0] == theirs[0]
        assert float(ours[1]) == pytest.approx(float(theirs[1]), abs=2e-6)
    with pytest.raises(DataError, match="given twice"):
        merge([parts[0], parts[0]], tmp_path / "twice.csv")


def test_a_stopped_run_goes_on(folder: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    words = (folder, "--model_path", tiny_model(), "--batch_size", 4, "--device", "cpu")
    assert infer(*words, "--output", "whole.csv", folder=tmp_path).returncode == 0
    stopped = infer(*words, "--max_runtime", "0.001s", folder=tmp_path)
    assert stopped.returncode == 85, stopped.stderr
    partial = tmp_path / "dog_probs.csv.partial"
    assert len(partial.read_text().splitlines()) == 4
    with open(partial, "a") as file:
        file.write("=5,0.1")  # a row that a power cut tore
    again = infer(*words, folder=tmp_path)
    assert "4 are answered already" in again.stdout
    assert again.returncode == 0
    assert (tmp_path / "dog_probs.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


def test_another_run_is_not_taken_up(tmp_path: Path) -> None:
    Table(tmp_path / "out.csv", ["fileid", "prob"], {"model": "a"}).add([("1", [0.5])], list)
    with pytest.raises(UsageError, match="of another run: model differ"):
        Table(tmp_path / "out.csv", ["fileid", "prob"], {"model": "b"})


def test_memory_stays_bounded_however_many_pictures(folder: Path, tiny_model: Callable[..., Path]) -> None:
    """No more than three batches are under way for each lane, and one more once the first is taken."""
    network, card = load_model(tiny_model())
    read: list[str] = []
    sources = find_sources([folder])

    def answers() -> Iterator[list[Row]]:
        from unittest.mock import patch

        import marten.pictures

        original = Path.read_bytes

        def counted(path: Path) -> bytes:
            read.append(path.name)
            return original(path)

        with patch.object(marten.pictures.Path, "read_bytes", counted):
            yield from ask([network], card.spec, sources, batch_size=2)

    running = answers()
    next(running)
    assert len(read) <= 8
    running.close()


def test_ids_stay_apart_and_in_natural_order(tmp_path: Path) -> None:
    # B0-22: the name up to the first dot made a.1.jpg and a.2.jpg the same
    for name in ("a.1.jpg", "a.2.jpg", "10.jpg", "9.jpg"):
        (tmp_path / name).touch()
    assert find_sources([tmp_path]).ids == ("9", "10", "a.1", "a.2")
    (tmp_path / "9.png").touch()
    assert find_sources([tmp_path]).ids[:2] == ("9.jpg", "9.png")
    assert sorted(find_sources([tmp_path]).shard(1, 2).ids + find_sources([tmp_path]).shard(2, 2).ids) == sorted(
        find_sources([tmp_path]).ids
    )


def test_labels_and_formats_that_fit_no_model_are_refused(tiny_model: Callable[..., Path]) -> None:
    spec = load_model(tiny_model(labels=("cat", "dog", "owl")))[1].spec
    with pytest.raises(UsageError, match="name one with --label"):
        header(spec, "prob", "")
    assert header(spec, "prob", "owl") == ["fileid", "prob"]
    with pytest.raises(UsageError, match="cat, dog, owl"):
        header(spec, "prob", "cow")


def test_what_infer_sub_sends_along_is_enough(folder: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Without a shared disk a job has nothing else: engines.py was missing once."""
    text = (ROOT / "deployment" / "htcondor" / "infer.sub").read_text(encoding="utf-8")
    (sent,) = (line for line in text.splitlines() if re.match(r"\s*code\s*=.*modelspec", line))
    names = re.findall(r"\$\(home\)/([\w.]+)", sent)
    assert "scripts" in names
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pth", "*.run", "__pycache__")
            )
        else:
            shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "scripts/infer", str(folder), "--model_path", str(tiny_model()), "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(table(tmp_path / "dog_probs.csv")) == COUNT - 1


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ((), 2, "give pictures and --model_path"),
        (("none", "--model_path", "m.pth"), 1, "no folder, zip, list or picture"),
        ((".", "--model_path", "m.pth", "--shard", "3"), 2, "--shard takes K/N"),
        ((".", "--model_path", "m.pth", "--batch_size", "0"), 2, "--batch_size"),
        (("cut.zip", "--model_path", "m.pth"), 1, "damaged or of another kind"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, words: tuple[str, ...], code: int, told: str) -> None:
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 cut")
    done = infer(*words, folder=tmp_path)
    assert done.returncode == code
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
