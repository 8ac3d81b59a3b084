"""Scores come from a table, are split evenly, scaled by the training part alone; Place Pulse's file becomes one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marten.datasets import Sample, split
from marten.errors import DataError, UsageError
from marten.files import ROOT
from marten.scoretable import convert_place_pulse, find_scores, fit_scale, has_scores, standard_of
from marten.settings import Settings
from marten.training import train
from tests.pictures import draw, encode

STUDY, OTHER = "50a68a51fdc9f05596000002", "50f62c41a84ea7c5fdd2e454"
COLUMNS = "\t_id\tlocation_id\tnum_votes\tplace_id\tstudy_id\ttrueskill.score\ttrueskill.stds.-1"


def scored(scores: list[float]) -> list[Sample]:
    return [Sample(f"{i}.jpg", Path(f"{i}.jpg"), 0, f"key {i}", score) for i, score in enumerate(scores)]


def table(folder: Path, text: str, name: str = "scores.csv") -> Path:
    for number in range(40):
        (folder / f"{number}.jpg").touch()
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_is_of_scores_by_its_columns(tmp_path: Path) -> None:
    assert has_scores(table(tmp_path, "path,score\n0.jpg,1\n"))
    assert has_scores(table(tmp_path, "\ufeffscore\tpath\n", "scores.tsv"))
    assert not has_scores(table(tmp_path, "path,label\n"))
    assert not has_scores(table(tmp_path, "path,label,score\n"))
    assert not has_scores(tmp_path)


def test_b2_21_what_has_no_score_is_left_out_and_told(tmp_path: Path) -> None:
    rows = ["path,score", "0.jpg,3.5", "1.jpg,", "2.jpg,nan", "3.jpg,much", "4.jpg,-2", "4.jpg,7", "gone.jpg,1", ",5"]
    found = find_scores(table(tmp_path, "\n".join(rows)))
    assert [(s.id, s.score) for s in found.samples] == [("0.jpg", 3.5), ("4.jpg", -2.0)]
    reasons = dict(found.rejected)
    assert {reasons[f"{n}.jpg"] for n in (1, 2, 3)} == {"no score in the table"}
    assert reasons["4.jpg"] == "listed again in line 7"
    assert reasons["gone.jpg"] == "no such file"
    assert "line 9" in reasons


@pytest.mark.parametrize("text", ["path,votes\n0.jpg,1", "path,score\n0.jpg,1\n1.jpg,1", "path,score\n0.jpg,1"])
def test_a_table_that_nothing_can_be_learnt_from_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError):
        find_scores(table(tmp_path, text))


def test_the_digest_tells_scores_apart_and_the_split_covers_their_range(tmp_path: Path) -> None:
    rows = [f"{n}.jpg,{(n * 7) % 40}" for n in range(40)]
    found = find_scores(table(tmp_path, "\n".join(["path,score", *rows])))
    other = find_scores(table(tmp_path, "\n".join(["path,score", *rows[:-1], "39.jpg,33.5"])))
    assert found.digest != other.digest
    training, validation = split(found.samples, 0.25, seed=3)
    assert not {s.id for s in training} & {s.id for s in validation}
    strata = [sum(10 * k <= (s.score or 0) < 10 * k + 10 for s in validation) for k in range(4)]
    assert all(2 <= count <= 3 for count in strata), strata


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=3, max_size=20).filter(lambda v: max(v) - min(v) > 1e-3))
def test_b2_21_the_scale_is_fitted_on_the_training_part_alone(scores: list[float]) -> None:
    training, validation = scored(scores), scored([min(scores) - 1, max(scores) + 1])
    scale = fit_scale(training, (1.0, 10.0))
    assert scale is not None
    scaled = [s.score for s in scale.apply(training)]
    assert min(scaled) == pytest.approx(1)  # type: ignore[type-var]
    assert max(scaled) == pytest.approx(10)  # type: ignore[type-var]
    below, above = (s.score for s in scale.apply(validation))
    assert below < 1  # type: ignore[operator]
    assert above > 10  # type: ignore[operator]
    mean, spread = standard_of(scale.apply(training))
    assert 1 <= mean <= 10
    assert 0 < spread <= 4.5000001


def test_a_training_part_of_equal_scores_is_refused() -> None:
    assert fit_scale(scored([1, 2]), ()) is None
    with pytest.raises(DataError, match="have the score 2"):
        standard_of(scored([2, 2, 2]))
    with pytest.raises(UsageError, match="--score_range"):
        Settings(score_range=(10.0, 1.0))
    with pytest.raises(UsageError, match="--loss"):
        Settings(loss="hinge")


def test_s2_03_place_pulse_becomes_a_table(tmp_path: Path) -> None:
    """Per study; votes that are missing or none are dropped and counted, as is what has no picture."""
    for name in (
        "51.5_-0.1_loc1_LONDON.JPG",
        "48.8_2.3_loc2_PARIS.JPG",
        "1_2_loc4_X.JPG",
        "3_4_loc5_Y.JPG",
        "notes.txt",
    ):
        (tmp_path / name).touch()
    rows = [
        f"0\ta\tloc1\t12\tp\t{STUDY}\t25.5\t3.1",
        f"1\tb\tloc1\t12\tp\t{OTHER}\t99\t3.1",
        f"2\tc\tloc2\t3\tp\t{STUDY}\t31.25\t3.1",
        f"3\td\tloc3\t3\tp\t{STUDY}\t20\t3.1",
        f"4\te\tloc4\t0\tp\t{STUDY}\t20\t3.1",
        f"5\tf\tloc5\t4\tp\t{STUDY}\t\t3.1",
    ]
    qscores = tmp_path / "qscores.tsv"
    qscores.write_text("\n".join([COLUMNS, *rows]))
    text, counts = convert_place_pulse(qscores, tmp_path, STUDY)
    assert counts == {"rows": 6, "other_study": 1, "no_votes": 2, "no_picture": 1, "kept": 2}
    (tmp_path / "scores.csv").write_text(text)
    found = find_scores(tmp_path / "scores.csv")
    assert [(s.id, s.score) for s in found.samples] == [
        ("48.8_2.3_loc2_PARIS.JPG", 31.25),
        ("51.5_-0.1_loc1_LONDON.JPG", 25.5),
    ]
    with pytest.raises(DataError, match=OTHER):
        convert_place_pulse(qscores, tmp_path, "beautiful")


def test_the_command_writes_the_table_beside_the_pictures(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"1_2_loc{number}_X.JPG").touch()
    rows = [f"{n}\ta\tloc{n}\t{n}\tp\t{STUDY}\t{20 + n}\t3.1" for n in range(3)]
    (tmp_path / "qscores.tsv").write_text("\n".join([COLUMNS, *rows]))
    words = ["scores", str(tmp_path / "qscores.tsv"), "--data_dir", str(tmp_path), "--study", STUDY]
    told = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "data"), *words], capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("3 rows, 0 other study, 1 no votes, 0 no picture, 2 kept\n")
    assert (tmp_path / "scores.csv").read_text() == "path,score,votes\n1_2_loc1_X.JPG,21.0,1\n1_2_loc2_X.JPG,22.0,2\n"


def test_flags_of_scores_are_refused_for_classes(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        (tmp_path / "pictures" / f"{('cat', 'dog')[number % 2]}.{number}.png").write_bytes(encode(draw(number), "PNG"))
    with pytest.raises(UsageError, match="holds classes"):
        train(
            Settings(
                conv_net="cat_dog_conv_net",
                data_dir=str(tmp_path / "pictures"),
                model_path=str(tmp_path / "m.pth"),
                score_range=(1, 10),
                device="cpu",
            )
        )
