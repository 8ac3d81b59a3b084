"""Every figure of an evaluation is what scikit-learn, or a second computation, makes of the same predictions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from marten.scores import (
    calibration,
    classification_scores,
    fit_temperature,
    hits_at,
    mean_with_interval,
    roc_curve,
    softmax,
)


def guesses(seed: int, classes: int, count: int = 300, digits: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities that know something of them; rounded, so that there are ties."""
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, classes, count)
    logits_NK = rng.normal(0, 1, (count, classes)) + 1.5 * np.eye(classes)[labels_N]
    return labels_N, softmax(logits_NK.round(digits))


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_figures_are_those_of_scikit_learn(classes: int) -> None:
    labels_N, probs_NK = guesses(classes, classes, digits=0)
    names = [f"class {k}" for k in range(classes)]
    told = classification_scores(labels_N, probs_NK, names)
    answers_N = probs_NK.argmax(1)
    assert told["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(labels_N, answers_N))
    assert told["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels_N, answers_N))
    assert told["macro_f1"] == pytest.approx(metrics.f1_score(labels_N, answers_N, average="macro"))
    assert told["log_loss"]["value"] == pytest.approx(metrics.log_loss(labels_N, probs_NK))
    assert told["confusion"] == metrics.confusion_matrix(labels_N, answers_N).tolist()
    truth_NK = np.eye(classes)[labels_N]
    assert told["brier"]["value"] == pytest.approx(((probs_NK - truth_NK) ** 2).sum() / len(labels_N))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(labels_N, answers_N)
    for k, one in enumerate(told["per_class"]):
        assert one["support"] == support[k]
        assert one["precision"]["value"] == pytest.approx(precision[k])
        assert one["recall"]["value"] == pytest.approx(recall[k])
        assert one["f1"] == pytest.approx(f1[k])
        assert one["roc_auc"]["value"] == pytest.approx(metrics.roc_auc_score(labels_N == k, probs_NK[:, k]))
        wanted = metrics.average_precision_score(labels_N == k, probs_NK[:, k])
        assert one["average_precision"] == pytest.approx(wanted)
        low, high = one["roc_auc"]["interval_95"]
        assert low < one["roc_auc"]["value"] < high
        assert one["roc"][0] == [0, 0]
        assert one["roc"][-1] == [1, 1]
        assert one["pr"][-1][0] == 1


@pytest.mark.parametrize("k", [1, 2, 3, 5, 50])
def test_s2_13_precision_at_k_counts_as_scikit_learn_does(k: int) -> None:
    labels_N, probs_NK = guesses(4, 6)
    hits = hits_at(labels_N, probs_NK, k)
    if k < 6:
        assert hits == metrics.top_k_accuracy_score(labels_N, probs_NK, k=k, normalize=False)
    else:
        assert hits == len(labels_N)


def test_precision_at_5_of_two_classes_is_left_out_rather_than_always_right() -> None:
    labels_N, probs_NK = guesses(0, 2)
    assert list(classification_scores(labels_N, probs_NK, ["a", "b"])["precision_at_k"]) == ["1"]
    labels_N, probs_NK = guesses(0, 6)
    assert list(classification_scores(labels_N, probs_NK, list("abcdef"))["precision_at_k"]) == ["1", "5"]


def test_equal_probabilities_are_no_hit_for_every_class() -> None:
    labels_N, probs_NK = np.array([0, 1, 2]), np.full((3, 3), 1 / 3)
    assert [hits_at(labels_N, probs_NK, k) for k in (1, 2, 3)] == [1, 2, 3]


def test_what_is_not_defined_is_none() -> None:
    probs_NK = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0]])
    told = classification_scores(np.array([0, 1]), probs_NK, ["a", "b", "c"])
    a, b, c = told["per_class"]
    assert b["precision"] is None
    assert b["recall"]["value"] == 0
    assert b["f1"] == 0
    assert (c["precision"], c["recall"], c["f1"], c["roc_auc"]) == (None, None, None, None)
    assert a["recall"]["value"] == 1
    assert told["balanced_accuracy"] == 0.5


def test_a_certain_mistake_costs_much_and_not_infinitely_much() -> None:
    told = classification_scores(np.array([1, 0]), np.array([[1.0, 0.0], [1.0, 0.0]]), ["a", "b"])
    assert 20 < told["log_loss"]["value"] < 100


def test_calibration_of_bins_by_hand() -> None:
    probs_NK = np.array([[0.95, 0.05], [0.95, 0.05], [0.62, 0.38], [0.38, 0.62]])
    told = calibration(np.array([0, 1, 0, 0]), probs_NK, bins=10)
    assert [(b["accuracy"]["hits"], b["accuracy"]["count"]) for b in told["bins"]] == [(1, 2), (1, 2)]
    assert told["ece"] == pytest.approx((2 * abs(0.62 - 0.5) + 2 * abs(0.95 - 0.5)) / 4)
    assert calibration(np.array([0]), np.array([[1.0, 0.0]]))["bins"][0]["to"] == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), truth=st.floats(0.3, 4))
def test_the_fitted_temperature_has_the_least_loss_of_all(seed: int, truth: float) -> None:
    rng = np.random.default_rng(seed)
    calibrated_NK = rng.normal(0, 2, (400, 3))
    labels_N = np.array([rng.choice(3, p=p) for p in softmax(calibrated_NK)])
    logits_NK = calibrated_NK * truth

    def loss(temperature: float) -> float:
        return float(metrics.log_loss(labels_N, softmax(logits_NK / temperature)))

    found = fit_temperature(logits_NK, labels_N)
    assert loss(found) <= min(loss(found * step) for step in (0.98, 1.02, 1 / found)) + 1e-9
    assert found == pytest.approx(truth, rel=0.35)


def test_the_temperature_stays_in_its_range_where_there_is_no_best_one() -> None:
    logits_NK = np.array([[4.0, 0.0], [0.0, 3.0]])
    assert fit_temperature(logits_NK, np.array([0, 1])) == pytest.approx(0.05)
    assert fit_temperature(logits_NK, np.array([1, 0])) == pytest.approx(20)


def test_a_curve_has_one_point_per_distinct_score() -> None:
    thresholds, right_N, wrong_N = roc_curve(np.array([True, False, True, False]), np.array([0.9, 0.5, 0.5, 0.1]))
    assert thresholds.tolist() == [0.9, 0.5, 0.1]
    assert right_N.tolist() == [1, 2, 2]
    assert wrong_N.tolist() == [0, 1, 2]


def test_the_interval_of_a_mean_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    told = [mean_with_interval(rng.exponential(1, 200))["interval_95"] for _ in range(500)]
    assert 0.90 < sum(low <= 1 <= high for low, high in told) / 500 < 0.98
    assert mean_with_interval(np.array([2.0])) == {"value": 2.0, "count": 1, "interval_95": None}
    assert math.isclose(mean_with_interval(np.array([1.0, 3.0]))["value"], 2)
