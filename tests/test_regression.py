"""Scores from pictures to the archive's answer: learnt on drawn pictures, judged on those that were held out."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import stats
from sklearn import metrics

from marten.archive import plan_archive, write_archive
from marten.evaluate import ask, evaluate, pictures_to_ask
from marten.files import ROOT
from marten.objectives import Classes, Scores
from marten.scores import regression_scores, spearman
from marten.settings import Settings
from marten.training import train
from marten.weights import load_model
from tests.servers import Serve, free_ports

GREEN = (20, 200, 40)


@pytest.fixture(scope="module")
def greens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 160 pictures whose score is 20 + 30 times the share of green in them."""
    folder, rng = tmp_path_factory.mktemp("greens"), random.Random(0)
    rows = ["path,score"]
    for number in range(160):
        picture = Image.new("RGB", (48, 48), tuple(rng.randrange(60, 120) for _ in range(3)))
        brush = ImageDraw.Draw(picture)
        for _ in range(rng.randrange(15)):
            x, y = rng.randrange(44), rng.randrange(44)
            brush.rectangle((x, y, x + 8, y + 8), fill=GREEN)
        picture.save(folder / f"{number}.png")
        share = (np.asarray(picture) == GREEN).all(2).mean()
        rows.append(f"{number}.png,{20 + 30 * share:.4f}")
    (folder / "greens.csv").write_text("\n".join(rows))
    return folder / "greens.csv"


@pytest.fixture(scope="module")
def model(greens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model_green.pth"
    train(
        Settings(
            conv_net="cat_dog_conv_net",
            data_dir=str(greens),
            model_path=str(path),
            epochs=5,
            batch_size=16,
            validation_split=0.3,
            augment="flip",
            dropout=0,
            num_workers=0,
            device="cpu",
            precision="fp32",
            score_range=(1.0, 10.0),
            loss="huber",
        )
    )
    return path


def test_a_small_network_learns_a_score_and_tells_it_of_pictures_it_never_saw(model: Path, greens: Path) -> None:
    network, card = load_model(model)
    pictures, part = pictures_to_ask(card, greens)
    assert part == "validation"
    logits_NK = ask(network, card.spec, pictures.samples)
    scores = evaluate(card.spec, pictures, part, logits_NK).scores
    assert scores["count"] == card.metrics["validation_mae"]["count"]
    assert scores["mae"]["value"] == pytest.approx(card.metrics["validation_mae"]["value"], abs=1e-4)
    assert scores["r2"]["interval_95"][0] > 0.3
    assert scores["spearman"]["interval_95"][0] > 0.5
    answers = card.spec.answers(torch.from_numpy(logits_NK))
    assert set(answers[0]) == {"score"}
    assert all(-2 < answer["score"] < 13 for answer in answers)


def test_b2_21_the_scale_is_that_of_the_training_part(model: Path, greens: Path) -> None:
    _, card = load_model(model)
    with open(greens, newline="") as file:
        score = {row["path"]: float(row["score"]) for row in csv.DictReader(file)}
    with open(model.with_suffix(".run") / "split.csv", newline="") as file:
        trained = [score[row["path"]] for row in csv.DictReader(file) if row["split"] == "train"]
    assert card.data["scale"] == {"low": min(trained), "high": max(trained), "least": 1.0, "most": 10.0}
    on_scale = [1 + 9 * (s - min(trained)) / (max(trained) - min(trained)) for s in trained]
    assert card.spec.score_offset == pytest.approx(np.mean(on_scale))
    assert card.spec.score_scale == pytest.approx(np.std(on_scale))
    assert card.spec.labels == ()


def test_the_curves_tell_errors_in_the_units_of_the_answers(model: Path) -> None:
    rows = [json.loads(line) for line in (model.with_suffix(".run") / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert not [key for key in rows[0] if "accuracy" in key]
    assert rows[-1]["validation_mae"] < rows[0]["validation_mae"] < 9


def test_commands_judge_report_and_archive_it(model: Path, greens: Path, tmp_path: Path) -> None:
    def command(name: str, *words: str | Path) -> str:
        line = [sys.executable, str(ROOT / "scripts" / name), *map(str, words)]
        told = subprocess.run(line, capture_output=True, text=True, timeout=180)
        assert told.returncode == 0, told.stderr
        return told.stdout

    told = command("evaluate", "-p", model, "--data_dir", greens, "--device", "cpu", "--mistakes", "2")
    assert "spearman" in told
    out = model.with_suffix(".run") / "evaluation"
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    truth, answers = (np.array([float(row[key]) for row in rows]) for key in ("score", "answer"))
    scores = json.loads((out / "evaluation.json").read_text())["scores"]
    assert scores["mae"]["value"] == pytest.approx(np.abs(truth - answers).mean(), rel=1e-5)
    assert scores["r2"]["value"] == pytest.approx(metrics.r2_score(truth, answers), rel=1e-4)
    worst = json.loads((out / "mistakes.json").read_text())
    farthest = max(rows, key=lambda row: abs(float(row["error"])))
    assert worst[0]["path"] == farthest["path"]
    command("report", "-p", model, "--model_card")
    page = (model.with_suffix(".run") / "report.html").read_text()
    assert f"{scores['spearman']['value']:.4f}" in page
    assert "Answers and truth" in page
    command("archive", "--model_path", model, "--export_path", tmp_path)
    (mar,) = tmp_path.glob("*.mar")
    with zipfile.ZipFile(mar) as archive:
        assert json.loads(archive.read("model_green.json"))["spec"]["task"] == "regression"


@pytest.mark.server
def test_a_live_torchserve_answers_a_score(model: Path, greens: Path, tmp_path: Path) -> None:
    planned = plan_archive(model, name="green", export_path=tmp_path / "store")
    write_archive(planned)
    server = Serve(planned.export_path, tmp_path / "run", free_ports())
    started = server.run("start", "green")
    assert started.returncode == 0, started.stderr
    try:
        network, card = load_model(model)
        pictures, _ = pictures_to_ask(card, greens)
        samples = pictures.samples[:12]
        wanted = card.spec.answers(torch.from_numpy(ask(network, card.spec, samples)))
        answers = []
        for sample, expected in zip(samples, wanted, strict=True):
            status, body = server.ask("green", sample.path.read_bytes())
            assert status == 200, body
            answer = json.loads(body)
            assert set(answer) == {"score"}
            assert answer["score"] == pytest.approx(expected["score"], abs=1e-3)
            answers.append(answer["score"])
        assert spearman(np.array([s.score for s in samples]), np.array(answers)) > 0.3
        status, body = server.ask("green", b"no picture")
        assert (status, json.loads(body)["code"]) == (415, 415)
    finally:
        assert server.run("stop", "--drain_s", "0").returncode == 0


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_scikit_learn_and_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth_N = rng.normal(5, 2, 120).round(seed)  # with ties
    answers_N = (truth_N + rng.normal(0, 1, 120)).round(seed)
    told = regression_scores(truth_N, answers_N)
    assert told["mae"]["value"] == pytest.approx(metrics.mean_absolute_error(truth_N, answers_N))
    assert told["rmse"]["value"] == pytest.approx(metrics.root_mean_squared_error(truth_N, answers_N))
    assert told["r2"]["value"] == pytest.approx(metrics.r2_score(truth_N, answers_N))
    assert told["spearman"]["value"] == pytest.approx(stats.spearmanr(truth_N, answers_N).statistic)
    for name in ("mae", "rmse", "r2", "spearman"):
        low, high = told[name]["interval_95"]
        assert low < told[name]["value"] < high
    assert told == regression_scores(truth_N, answers_N)


def test_what_is_not_defined_is_none() -> None:
    assert spearman(np.ones(5), np.arange(5.0)) is None
    told = regression_scores(np.ones(5), np.arange(5.0))
    assert told["r2"] is None
    assert told["mae"]["value"] == pytest.approx(1.4)


def test_losses_are_those_of_standardised_scores() -> None:
    outputs_NK, targets_N = torch.tensor([[0.0], [1.0], [-2.0]]), torch.tensor([5.0, 7.0, 9.0])
    squared, huber = Scores(5, 2), Scores(5, 2, huber=True)
    assert squared.losses(outputs_NK, targets_N, True).tolist() == [0, 0, 16]
    assert huber.losses(outputs_NK, targets_N, True).tolist() == [0, 0, 3.5]
    assert squared.worth(outputs_NK, targets_N).tolist() == [0, 0, 8]
    smoothed = Classes(0.2)
    logits_NK, labels_N = torch.tensor([[4.0, 0.0]]), torch.tensor([0])
    assert smoothed.losses(logits_NK, labels_N, True) > smoothed.losses(logits_NK, labels_N, False)
    assert smoothed.worth(logits_NK, labels_N).tolist() == [True]
