"""What is to be looked at before training, as tables and as a page with the pictures on it."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marten.datacheck import Findings, classes_table, evenness, findings_page, read_parts, write_findings
from marten.datasets import find_pictures, inspect
from marten.errors import DataError
from marten.files import ROOT
from marten.neighbours import find_pairs
from modelspec import Preprocess
from tests.pictures import draw, encode
from tests.test_report import Page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve cats and four dogs, one dog a smaller cat, and a file that is no picture."""
    made = tmp_path_factory.mktemp("looked")
    for number in range(15):
        label = "dog" if number > 11 else "cat"
        (made / f"{label}.{number}.png").write_bytes(encode(draw(number, (96, 80)), "PNG"))
    draw(3, (96, 80)).resize((60, 50), Image.Resampling.BICUBIC).save(made / "dog.15.jpg", quality=70)
    (made / "cat.99.jpg").write_bytes(b"\xff\xd8\xff no picture <b>")
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Findings:
    pictures = inspect(find_pictures(folder), Preprocess())
    parts = {s.id: "validation" if s.id == "dog.15.jpg" else "train" for s in pictures.samples}
    probs_NK = np.full((16, 2), 0.1)
    truth_N = [s.label for s in pictures.samples]
    probs_NK[np.arange(16), truth_N] = 0.9
    wrong = next(i for i, s in enumerate(pictures.samples) if s.id == "cat.5.png")
    probs_NK[wrong] = [0.03, 0.97]
    copies = [pair for pair in find_pairs(pictures.samples) if pair.second.id == "dog.15.jpg"]
    return Findings(pictures, copies, parts, probs_NK)


def test_the_page_shows_each_picture_and_says_what_is_wrong_with_it(found: Findings) -> None:
    text = findings_page(found)
    page = Page(text)
    shown = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [one["alt"] for one in shown] == ["cat.3.png", "dog.15.jpg", "cat.5.png"]
    assert all(str(one["src"]).startswith("data:image/jpeg;base64,") for one in shown)
    for told in (
        "under two labels, on both sides of the split",
        "labelled cat (3.0 %), looks like dog (97.0 %)",
        "The largest class has 3 times the pictures of the smallest",
        "cat.99.jpg: ",
    ):
        assert told in page.text
    assert "no picture <b>" not in text
    assert "http" not in text.split("</style>")[1]


def test_tables_hold_what_the_page_shows(found: Findings, tmp_path: Path) -> None:
    write_findings(found, tmp_path / "page.html", tmp_path / "pairs.csv", tmp_path / "suspects.csv")
    with open(tmp_path / "pairs.csv", newline="") as file:
        (pair,) = csv.DictReader(file)
    assert (pair["first"], pair["second"], pair["problem"]) == ("cat.3.png", "dog.15.jpg", "across labels")
    with open(tmp_path / "suspects.csv", newline="") as file:
        assert [(row["path"], row["likelier"]) for row in csv.DictReader(file)] == [("cat.5.png", "dog")]
    assert (tmp_path / "page.html").read_text() == findings_page(found)
    assert classes_table({"b": 1, "a": 3}) == "label,pictures,share\na,3,0.750000\nb,1,0.250000\n"


def test_evenness_is_the_exponential_of_the_entropy() -> None:
    assert evenness({"a": 7, "b": 7, "c": 7}) == pytest.approx({"ratio": 1, "as_many_as": 3, "most": 1 / 3})
    told = evenness({"a": 90, "b": 10})
    assert told["ratio"] == 9
    assert told["as_many_as"] == pytest.approx(math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)))


def test_a_page_of_nothing_found_says_so(found: Findings) -> None:
    page = Page(findings_page(Findings(found.pictures, [], {}, np.eye(2)[[s.label for s in found.pictures.samples]])))
    assert page.text.count("None were found.") == 2
    with pytest.raises(DataError, match="columns path and split"):
        read_parts(Path("/nowhere/split.csv"))


def test_the_command_lists_copies_and_writes_a_page(folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "scripts" / "data", "duplicates", folder, "--out", tmp_path / "two.csv"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert told.returncode == 0, told.stderr
    assert "pairs of 16 pictures look alike" in told.stdout
    assert "cat.3.png,dog.15.jpg" in (tmp_path / "two.csv").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two.csv", "two.html"]


@pytest.mark.slow
def test_the_command_looks_for_everything_on_photographs(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for label in ("cat", "dog"):
        for path in sorted((data_dir / "dogs-vs-cats" / "train").glob(f"{label}.*"))[:16]:
            (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    words = [sys.executable, ROOT / "scripts" / "data", "check", tmp_path / "data", "--into", tmp_path / "out"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    assert "2 classes, as even as 2.0" in told.stdout
    made = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert made == ["classes.csv", "findings.html", "pairs.csv", "suspects.csv"]
