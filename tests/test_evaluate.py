"""A model is judged by what it was not trained on, its predictions are tied to files, its card gets the temperature."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from marten.errors import DataError, UsageError
from marten.evaluate import ask, calibrated, evaluate, pictures_to_ask
from marten.files import ROOT
from marten.settings import Settings
from marten.training import train
from marten.weights import load_model
from modelspec import ModelCard
from tests.pictures import draw, encode

LABELS = ("cat", "dog", "newt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for number in range(30):
        path = folder / LABELS[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(draw(number, (60, 50)), "PNG"))
    (folder / "cat" / "damaged.png").write_bytes(b"\x89PNG and no more")
    return folder


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    path = tiny_model(labels=LABELS)
    for file in (path, path.with_suffix(".json")):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / path.name


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    told = [sys.executable, str(ROOT / "scripts" / "evaluate"), *map(str, words), "--device", "cpu"]
    return subprocess.run(told, capture_output=True, text=True, timeout=120)


def test_the_command_judges_calibrates_and_shows(model: Path, folder: Path) -> None:
    """Figures equal a recomputation from predictions.csv alone; the card is recalibrated and still loads."""
    told = command("--model_path", model, "--data_dir", folder, "--calibrate", "--mistakes", "3")
    assert told.returncode == 0, told.stderr
    out = model.with_suffix(".run") / "evaluation"
    scores = json.loads((out / "evaluation.json").read_text())["scores"]
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == sorted(f"{LABELS[n % 3]}/{n}.png" for n in range(30))
    assert all(row["label"] == row["path"].split("/")[0] for row in rows)
    probs_NK = np.array([[float(row[f"p_{name}"]) for name in LABELS] for row in rows])
    truth = [row["label"] for row in rows]
    assert scores["accuracy"]["hits"] == sum(int(row["correct"]) for row in rows)
    probs_NK /= probs_NK.sum(1, keepdims=True)  # eight digits in the file
    assert scores["log_loss"]["value"] == pytest.approx(metrics.log_loss(truth, probs_NK, labels=LABELS), rel=1e-6)
    assert scores["confusion"] == metrics.confusion_matrix(truth, [row["answer"] for row in rows]).tolist()

    network, card = load_model(model)
    assert card.spec.temperature != 1
    assert card.metrics["temperature"]["count"] == 30
    served = card.spec.answers(card.spec.logits(network, card.spec.preprocess(folder / rows[0]["path"])), topk=3)[0]
    assert [served[name] for name in LABELS] == pytest.approx([float(rows[0][f"p_{n}"]) for n in LABELS], rel=1e-4)

    mistakes = json.loads((out / "mistakes.json").read_text())
    wrong = sorted((float(r["confidence"]) for r in rows if r["correct"] == "0"), reverse=True)[:3]
    assert [one["confidence"] for one in mistakes] == pytest.approx(wrong)
    for one in mistakes:
        assert one["answer"] != one["label"] == one["path"].split("/")[0]
        for name in (one["picture"], one["cam"]):
            with Image.open(out / name) as picture:
                assert max(picture.size) <= 256


def test_calibration_makes_the_loss_less(model: Path, folder: Path) -> None:
    network, card = load_model(model)
    pictures, _ = pictures_to_ask(card, folder)
    logits_NK = 6 * ask(network, card.spec, pictures.samples, batch_size=7)  # far too sure of itself
    before = evaluate(card.spec, pictures, "all", logits_NK)
    after = evaluate(calibrated(card, before).spec, pictures, "all", logits_NK)
    assert after.scores["log_loss"]["value"] < before.scores["log_loss"]["value"]
    assert after.scores["calibration"]["ece"] < before.scores["calibration"]["ece"]
    assert after.scores["accuracy"] == before.scores["accuracy"]


def test_outputs_do_not_depend_on_the_batch(model: Path, folder: Path) -> None:
    network, card = load_model(model)
    pictures, _ = pictures_to_ask(card, folder)
    one, all_ = (ask(network, card.spec, pictures.samples, batch_size=size) for size in (1, 30))
    np.testing.assert_allclose(one, all_, atol=1e-4)


def test_what_was_trained_on_does_not_count(folder: Path, tmp_path: Path) -> None:
    """Of the set it was trained on, only the part that split.csv calls validation is asked."""
    path = tmp_path / "model.pth"
    settings = {"batch_size": 8, "epochs": 1, "validation_split": 0.3, "num_workers": 0, "device": "cpu", "seed": 5}
    train(Settings(conv_net="cat_dog_conv_net", data_dir=str(folder), model_path=str(path), **settings))  # type: ignore[arg-type]
    card = ModelCard.read(path.with_suffix(".json"))
    with open(tmp_path / "model.run" / "split.csv", newline="") as file:
        held_out = [row["path"] for row in csv.DictReader(file) if row["split"] == "validation"]
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    pictures, part = pictures_to_ask(card, copy)
    assert part == "validation"
    assert [s.id for s in pictures.samples] == held_out
    assert len(pictures_to_ask(card, copy, "train")[0].samples) == 30 - len(held_out)
    assert len(pictures_to_ask(card, copy, "all")[0].samples) == 30
    for part in ("train", "all"):
        told = command("--model_path", path, "--data_dir", copy, "--part", part, "--calibrate")
        assert (told.returncode, "not trained on" in told.stderr) == (2, True), told.stderr
    (copy / "cat" / "0.png").write_bytes(encode(draw(99), "PNG"))
    assert pictures_to_ask(card, copy)[1] == "all"
    with pytest.raises(UsageError, match="not the set"):
        pictures_to_ask(card, copy, "validation")


def test_a_strange_class_or_task_is_refused(model: Path, folder: Path) -> None:
    card = ModelCard.read(model.with_suffix(".json"))
    with pytest.raises(DataError, match="the model knows"):
        pictures_to_ask(replace(card, spec=replace(card.spec, labels=("cat", "dog", "eel"))), folder)
    with pytest.raises(UsageError, match="--part"):
        pictures_to_ask(card, folder, "test")
    told = command("--model_path", model, "--data_dir", folder, "--batch_size", "0")
    assert (told.returncode, "--batch_size" in told.stderr) == (2, True)
