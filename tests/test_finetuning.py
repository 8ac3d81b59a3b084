"""Learning rates, mixed pictures and weighed scores: each does what its formula says, and none forgets where it was."""

from __future__ import annotations

import csv
import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marten.datasets import Sample
from marten.errors import CHECKPOINTED, DONE, DataError, UsageError
from marten.mixing import mix
from marten.objectives import Scores
from marten.ratefinder import find_rate, rate_at, smoothed, steepest
from marten.schedules import learning_rate_factor
from marten.settings import Settings
from marten.training import Run
from marten.weighing import weigh
from tests.runs import QUICK, StopAfter, result, run_once


def rates_of(out: Path) -> list[tuple[float, float]]:
    with open(out / "model.run" / "rates.csv", newline="") as file:
        return [(float(row["head"]), float(row["backbone"])) for row in csv.DictReader(file)]


def test_finetune_is_a_cycle_for_the_head_and_half_a_one_for_all() -> None:
    factors = [learning_rate_factor("finetune", step, 300, 100) for step in range(300)]
    assert factors[:100] == [learning_rate_factor("onecycle", step, 100) for step in range(100)]
    assert factors[100:] == [learning_rate_factor("onecycle", step, 200) / 2 for step in range(200)]
    assert max(factors[:100]) == 1
    assert max(factors[100:]) == 0.5
    for freeze in ("none", "backbone", "0", "3"):
        with pytest.raises(UsageError, match="--freeze N"):
            Settings(schedule="finetune", freeze=freeze, epochs=3)


@pytest.mark.parametrize(
    "options",
    [
        {"mix": "both", "label_smoothing": 0.1, "schedule": "onecycle"},
        {"mix": "cutmix", "freeze": "1", "schedule": "finetune", "lr": (1e-3, 1e-4), "epochs": 3},
    ],
    ids=str,
)
def test_a_stop_leaves_no_trace_and_every_rate_is_the_formulas(
    drawn_set: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    # B2-01: a learning rate of 1e-3 became 1e-6
    assert run_once(drawn_set, tmp_path / "whole", **options) == DONE
    assert run_once(drawn_set, tmp_path / "parts", 8, **options) == CHECKPOINTED
    assert run_once(drawn_set, tmp_path / "parts", num_workers=1, **options) == DONE
    assert result(tmp_path / "parts") == result(tmp_path / "whole")
    settings = Settings(**{**QUICK, **options})
    steps, rates = 5 * settings.epochs, rates_of(tmp_path / "parts")
    held = 5 * int(settings.freeze) if settings.freeze.isdecimal() else 0
    assert rates == rates_of(tmp_path / "whole")
    for step, (head, backbone) in enumerate(rates):
        factor = learning_rate_factor(settings.schedule, step, steps, held)
        assert head == settings.lr[0] * factor
        assert backbone == (0 if step < held else settings.lr[-1] * factor)
    assert len(rates) == steps


def test_b2_01_the_first_step_of_adam_is_as_long_as_the_rate_says(drawn_set: Path, tmp_path: Path) -> None:
    flags = {**QUICK, "data_dir": str(drawn_set), "model_path": str(tmp_path / "m.pth"), "schedule": "constant"}
    run = Run(Settings(**{**flags, "lr": (2e-3, 5e-4), "ema": 0.0, "dropout": 0.0}))
    before = {name: p.detach().clone() for name, p in run.learner.network.named_parameters()}
    run.go_on(StopAfter(1))  # type: ignore[arg-type]
    head = run.architecture.head
    for name, p in run.learner.network.named_parameters():
        moved = (p.detach() - before[name]).abs()
        # Adam's first step is the rate itself wherever a gradient is not vanishingly small
        assert float(moved.max()) == pytest.approx(2e-3 if name.startswith(head) else 5e-4, rel=1e-3), name


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_mixed_pictures_are_made_of_two_in_the_shares_of_their_labels(how: str) -> None:
    images_NCHW = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 20, 30)
    labels_N = torch.arange(6)
    shares = []
    for step in range(60):
        mixed_NCHW, partners_N, share = mix(images_NCHW, labels_N, how, 3, step)
        again = mix(images_NCHW, labels_N, how, 3, step)
        assert torch.equal(again[0], mixed_NCHW)
        assert torch.equal(again[1], partners_N)
        expected_N = share * labels_N + (1 - share) * partners_N
        torch.testing.assert_close(mixed_NCHW.mean((1, 2, 3)), expected_N.float(), atol=1e-4, rtol=0)
        shares.append(share)
        if how == "cutmix":
            assert set(mixed_NCHW.unique().tolist()) <= set(range(6))
    assert 0 <= min(shares) < 0.35
    assert 0.8 < max(shares) <= 1
    assert torch.equal(mix(images_NCHW, labels_N, "none", 3, 0)[0], images_NCHW)


def test_the_finder_names_the_rate_of_the_steepest_fall() -> None:
    rates = [rate_at(step, 100) for step in range(100)]
    assert (rates[0], rates[-1]) == (pytest.approx(1e-7), pytest.approx(1.0))
    logs = np.log10(rates)
    losses = (2 - 1.5 / (1 + np.exp(-4 * (logs + 3))) + np.exp(5 * (logs + 0.8))).tolist()
    rng = random.Random(0)
    noisy = [loss + rng.gauss(0, 0.02) for loss in losses]
    found = steepest(rates, noisy)
    assert found is not None
    assert 3e-4 < found < 3e-3
    assert steepest(rates, [1 + rate for rate in rates]) is None
    assert smoothed([5.0] * 7) == pytest.approx([5.0] * 7)


def test_finding_a_rate_trains_nothing_and_leaves_a_running_one_alone(
    drawn_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**QUICK, "data_dir": str(drawn_set), "model_path": str(tmp_path / "model.pth"), "augment": "none"}
    assert find_rate(Settings(**flags), steps=16) == DONE
    assert "falls fastest at --lr" in capsys.readouterr().out
    made = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert made == ["model.run", "model.run/lr_finder.csv", "model.run/lr_finder.png"]
    assert (tmp_path / "model.run" / "lr_finder.png").read_bytes().startswith(b"\x89PNG")
    assert run_once(drawn_set, tmp_path, 2) == CHECKPOINTED
    with pytest.raises(UsageError, match="in progress"):
        find_rate(Settings(**flags))


def scored(scores: list[float], votes: list[float] | None = None) -> list[Sample]:
    votes = votes or [0.0] * len(scores)
    return [Sample(f"{i}", Path(f"{i}"), 0, "", s, v) for i, (s, v) in enumerate(zip(scores, votes, strict=True))]


def test_errors_count_by_votes_and_each_tenth_alike() -> None:
    samples = scored([1.0, 1.1, 1.2, 1.3, 10.0], [1, 2, 3, 4, 5])
    by_votes = [s.weight for s in weigh(samples, ["votes"])]
    assert by_votes == pytest.approx([v / 3 for v in (1, 2, 3, 4, 5)])
    by_tenths = [s.weight for s in weigh(samples, ["tenths"])]
    assert sum(by_tenths[:4]) == pytest.approx(by_tenths[4])
    both = [s.weight for s in weigh(samples, ["votes", "tenths"])]
    products = np.multiply(by_votes, by_tenths)
    assert both == pytest.approx(products / products.mean())
    for weights in (by_votes, by_tenths, both):
        assert np.mean(weights) == pytest.approx(1)
    assert max(s.weight for s in weigh(scored([1.0] * 999 + [2.0]), ["tenths"])) < 10.1
    with pytest.raises(DataError, match="5 of 5 pictures have no votes"):
        weigh(scored([1, 2, 3, 4, 5]), ["votes"])
    assert [dataclasses.replace(s, weight=1.0) for s in weigh(samples, ["votes"])] == samples


def test_a_weight_multiplies_a_scores_loss_and_nothing_else() -> None:
    scores = Scores(5, 2)
    outputs_NK, targets_N = torch.tensor([[0.0], [1.0], [-2.0]]), torch.tensor([5.0, 7.5, 9.0])
    weighted_NK = torch.stack([targets_N, torch.tensor([1.0, 4.0, 0.5])], 1)
    plain = scores.losses(outputs_NK, targets_N, True)
    assert scores.losses(outputs_NK, weighted_NK, True).tolist() == (plain * weighted_NK[:, 1]).tolist()
    assert scores.worth(outputs_NK, weighted_NK).tolist() == scores.worth(outputs_NK, targets_N).tolist()
