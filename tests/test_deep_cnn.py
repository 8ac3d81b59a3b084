"""The flags of recode-perceptions: scenes and scores from its folders to its files, and --wandb=False that is off."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marten.files import ROOT
from modelspec import ModelCard
from tests.test_import_rule import OURS, imported, roots, sources

STUDY = "50a68a51fdc9f05596000002"
QUICK = ["--model", "cat_dog_conv_net", "--weights", "none", "--num_workers", "0"]


def deep_cnn(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "WB_"))}
    return subprocess.run(
        [sys.executable, "-m", "deep_cnn", *map(str, words)],
        cwd=ROOT,
        env={**clean, "VIRTUAL_ENV": sys.prefix, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_scenes_from_the_originals_folders(data_dir: Path, tmp_path: Path) -> None:
    # B2-02: --wandb=False turned it on, and the first documented command asked for a key; here an import would fail
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise RuntimeError('wandb was imported')")
    (tmp_path / "input").symlink_to(data_dir / "places")
    words = ["--root_dir", tmp_path, "--data_dir", "input", "--epochs", "3", "--batch_size", "5", "--run_name", "five"]
    told = deep_cnn(*QUICK, *words, "--wandb=False", PYTHONPATH=str(tmp_path / "broken"), WB_KEY="x" * 40)
    assert told.returncode == 0, told.stderr
    out = tmp_path / "outputs"
    card = ModelCard.read(out / "models" / "five.json")
    assert card.spec.labels == ("alley", "auto_factory", "beach", "boathouse", "butte")
    with open(out / "results" / "five.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "train_loss", "val_loss", "train_precision@1", "val_precision@1"]
    assert len(rows) == 3
    test = json.loads((out / "results" / "five.json").read_text())
    assert test["count"] == 5
    assert "LOSS train" in told.stdout
    assert f"test precision@1 {test['accuracy']['value']:.4f}" in told.stdout


def test_scores_from_the_originals_table(tmp_path: Path) -> None:
    rng = random.Random(1)
    pictures = tmp_path / "images"
    pictures.mkdir()
    (tmp_path / "meta").mkdir()
    rows = ["\t_id\tlocation_id\tnum_votes\tplace_id\tstudy_id\ttrueskill.score\ttrueskill.stds.-1"]
    for n in range(60):
        green = rng.random()
        noise = np.random.default_rng(n).integers(0, 40, (40, 60, 3))
        shade = np.array([60, 60 + 150 * green, 60])
        Image.fromarray((shade + noise).astype(np.uint8)).save(pictures / f"51.5_-0.1_loc{n}_LONDON.JPG")
        rows.append(f"{n}\ti{n}\tloc{n}\t{1 + n % 7}\tp\t{STUDY}\t{20 + 10 * green:.4f}\t3.1")
    rows.append(f"60\ti60\tloc0\t\tp\t{STUDY}\t\t")  # a location without a vote in this study
    (tmp_path / "meta" / "qscores.tsv").write_text("\n".join(rows))
    words = ["--root_dir", tmp_path, "--data_dir", "images", "--metadata", "meta", "--study_id", STUDY, "--oversample"]
    told = deep_cnn(*QUICK, *words, "--epochs", "4", "--batch_size", "8", "--run_name", "safe", "--verbose")
    assert told.returncode == 0, told.stderr
    assert "1 no votes" in told.stdout
    # B2-21: the original judged by what it had chosen by, and nan in the scores made every loss nan
    parts = {}
    for name in ("train", "test"):
        with open(pictures / f"scores_{name}.csv", newline="") as file:
            parts[name] = {row["path"] for row in csv.DictReader(file)}
    assert not parts["train"] & parts["test"]
    assert len(parts["train"] | parts["test"]) == 60
    assert 12 <= len(parts["test"]) <= 24
    card = ModelCard.read(tmp_path / "outputs" / "models" / "safe.json")
    assert (card.data["scale"]["least"], card.data["scale"]["most"]) == (1.0, 10.0)
    assert card.training["weigh"] == ["tenths"]
    test = json.loads((tmp_path / "outputs" / "results" / "safe.json").read_text())
    assert test["count"] == len(parts["test"])
    assert test["spearman"]["value"] > 0.6
    assert (tmp_path / "outputs" / "plots" / "safe.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--wandb", "perhaps"], "True or False"),
        (["--pre", "vit"], "no network called 'vit'"),
        (["--model", "resnet19"], "resnet18"),
        (["--data_dir", "nowhere"], "scripts/data places"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_cannot_be_meant_is_said_in_one_line(words: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "input" / "places365_standard" / "train").mkdir(parents=True)
    done = deep_cnn("--root_dir", tmp_path, *words)
    assert done.returncode in (1, 2)
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("path", sources("deep_cnn"), ids=lambda path: path.name)
def test_the_alias_imports_the_library_alone(path: Path) -> None:
    assert roots(imported(path)) & set(OURS) <= {"marten", "modelspec"}
