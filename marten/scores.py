"""What predictions are worth: every figure of an evaluation, from truth and answers alone.

Arrays are numpy: labels_N int (pictures,), probs_NK float64 (pictures, classes), rows summing to 1. A figure that is
not defined, the precision of a class that was never answered for instance, is None and never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from marten.metrics import share_with_interval

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BINS = 15
"""Bins of the reliability curve. Source: Guo et al. 2017, On Calibration of Modern Neural Networks."""
CURVE_POINTS = 200
"""Points that a ROC or PR curve keeps at most; its area is computed from all."""
_Z = 1.959964
_RESAMPLES = 1000


def classification_scores(labels_N: Ints, probs_NK: Floats, names: Sequence[str]) -> dict[str, Any]:
    """Every figure of a classifier, as plain data for JSON.

    Returns:
        count, accuracy and precision@k with their Wilson intervals, balanced_accuracy, macro_f1, log_loss, brier,
        calibration, per_class (precision, recall, f1, roc_auc, average_precision, curves), and confusion, whose rows
        are the true classes and columns the answered ones.
    """
    count, classes = probs_NK.shape
    answers_N = probs_NK.argmax(1)
    confusion_NK = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion_NK, (labels_N, answers_N), 1)
    per_class = [_class_scores(confusion_NK, k, name, labels_N, probs_NK) for k, name in enumerate(names)]
    losses_N = -np.log(np.clip(probs_NK[np.arange(count), labels_N], np.finfo(np.float32).tiny, 1.0))
    squares_N = ((probs_NK - np.eye(classes)[labels_N]) ** 2).sum(1)
    return {
        "count": count,
        "accuracy": share_with_interval(int((answers_N == labels_N).sum()), count),
        "precision_at_k": {
            str(k): share_with_interval(hits_at(labels_N, probs_NK, k), count) for k in (1, 5) if k < classes or k == 1
        },
        "balanced_accuracy": _mean([one["recall"]["value"] for one in per_class if one["support"]]),
        "macro_f1": _mean([one["f1"] for one in per_class if one["f1"] is not None]),
        "log_loss": mean_with_interval(losses_N),
        "brier": mean_with_interval(squares_N),
        "calibration": calibration(labels_N, probs_NK),
        "per_class": per_class,
        "confusion": confusion_NK.tolist(),
    }


def hits_at(labels_N: Ints, probs_NK: Floats, k: int) -> int:
    """Pictures whose true class is among the k likeliest; any k, also beyond the number of classes."""
    own_N = probs_NK[np.arange(len(labels_N)), labels_N][:, None]
    # of equal probabilities the lower index comes first, as argmax has it
    earlier_NK = (probs_NK == own_N) & (np.arange(probs_NK.shape[1]) < labels_N[:, None])
    return int((((probs_NK > own_N) | earlier_NK).sum(1) < k).sum())


def calibration(labels_N: Ints, probs_NK: Floats, bins: int = BINS) -> dict[str, Any]:
    """How far the probability of the answer is from its share of right ones.

    Returns:
        ece: mean distance of confidence and accuracy over equal-width bins, weighted by their counts.
        bins: of those that are not empty: from, to, count, confidence (mean) and accuracy.
    """
    confidence_N = probs_NK.max(1)
    hits_N = probs_NK.argmax(1) == labels_N
    bin_N = np.minimum((confidence_N * bins).astype(np.int64), bins - 1)
    told = []
    for number in range(bins):
        inside_N = bin_N == number
        if inside_N.any():
            share = share_with_interval(int(hits_N[inside_N].sum()), int(inside_N.sum()))
            mean = float(confidence_N[inside_N].mean())
            told.append({"from": number / bins, "to": (number + 1) / bins, "confidence": mean, "accuracy": share})
    ece = sum(
        one["accuracy"]["count"] * abs(one["confidence"] - one["accuracy"]["value"])  # type: ignore[index]
        for one in told
    )
    return {"ece": ece / len(labels_N), "bins": told}


def fit_temperature(logits_NK: Floats, labels_N: Ints) -> float:
    """The temperature that makes the mean negative log likelihood least; 1 changes nothing, above 1 is more modest.

    The loss is convex in 1 / temperature, so bisection on its slope finds the one minimum. It is sought between
    0.05 and 20; where every answer is right there is none, and the result is the lower end.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, section 4.2.
    """
    own_N = logits_NK[np.arange(len(labels_N)), labels_N]

    def slope(inverse: float) -> float:
        probs_NK = softmax(logits_NK * inverse)
        return float(((probs_NK * logits_NK).sum(1) - own_N).mean())

    low, high = 1 / 20.0, 1 / 0.05
    if slope(low) >= 0:
        return 1 / low
    if slope(high) <= 0:
        return 1 / high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def softmax(logits_NK: Floats) -> Floats:
    """Probabilities of rows of logits."""
    powers: Floats = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
    probs: Floats = powers / powers.sum(1, keepdims=True)
    return probs


def mean_with_interval(values_N: Floats) -> dict[str, Any]:
    """A mean, how many it is of, and its 95 % interval by the normal law (standard error from the sample)."""
    mean, count = float(values_N.mean()), len(values_N)
    spread = _Z * float(values_N.std(ddof=1)) / math.sqrt(count) if count > 1 else None
    return {"value": mean, "count": count, "interval_95": None if spread is None else [mean - spread, mean + spread]}


def roc_curve(truth_N: npt.NDArray[np.bool_], scores_N: Floats) -> tuple[Floats, Floats, Floats]:
    """Counts of right and wrong alarms as the threshold falls over the distinct scores.

    Returns:
        (thresholds, true positives, false positives), one per distinct score, falling.
    """
    order_N = np.argsort(-scores_N, kind="stable")
    sorted_N, truth_sorted_N = scores_N[order_N], truth_N[order_N]
    last_N = np.append(np.flatnonzero(np.diff(sorted_N)), len(sorted_N) - 1)
    right_N = np.cumsum(truth_sorted_N)[last_N].astype(np.float64)
    return sorted_N[last_N], right_N, 1.0 + last_N - right_N


def _class_scores(confusion_NK: Ints, k: int, name: str, labels_N: Ints, probs_NK: Floats) -> dict[str, Any]:
    hits, support, answered = (int(n) for n in (confusion_NK[k, k], confusion_NK[k].sum(), confusion_NK[:, k].sum()))
    told: dict[str, Any] = {
        "label": name,
        "support": support,
        "precision": share_with_interval(hits, answered) if answered else None,
        "recall": share_with_interval(hits, support) if support else None,
        "f1": 2 * hits / (support + answered) if support + answered else None,
        "roc_auc": None,
        "average_precision": None,
    }
    others = len(labels_N) - support
    if not support or not others:
        return told
    _, right_N, wrong_N = roc_curve(labels_N == k, probs_NK[:, k])
    rates_N, alarms_N = np.append(0.0, right_N / support), np.append(0.0, wrong_N / others)
    area = float(np.trapezoid(rates_N, alarms_N))
    precision_N = right_N / (right_N + wrong_N)
    kept = np.unique(np.linspace(0, len(right_N) - 1, min(len(right_N), CURVE_POINTS)).astype(int))
    return told | {
        "roc_auc": {"value": area, "interval_95": _auc_interval(area, support, others)},
        "average_precision": float((np.diff(rates_N) * precision_N).sum()),
        "roc": [[0.0, 0.0], *np.stack([alarms_N[1:], rates_N[1:]], 1)[kept].round(5).tolist()],
        "pr": np.stack([rates_N[1:], precision_N], 1)[kept].round(5).tolist(),
    }


def _auc_interval(area: float, positives: int, negatives: int) -> list[float]:
    """Source: Hanley and McNeil 1982, The Meaning and Use of the Area under a ROC Curve."""
    both, twice = area / (2 - area), 2 * area * area / (1 + area)
    square = area * (1 - area) + (positives - 1) * (both - area**2) + (negatives - 1) * (twice - area**2)
    spread = _Z * math.sqrt(max(square, 0.0) / (positives * negatives))
    return [max(0.0, area - spread), min(1.0, area + spread)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def regression_scores(truth_N: Floats, answers_N: Floats) -> dict[str, Any]:
    """Every figure of answered scores, as plain data for JSON.

    Returns:
        count; mae, rmse, r2 and spearman, each with a 95 % percentile interval over 1,000 resamples of the pictures
        (seeded: equal answers give equal intervals). r2 and spearman are None where all scores are equal.
    """
    figures = {"mae": _mae, "rmse": _rmse, "r2": _r2, "spearman": spearman}
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(truth_N), len(truth_N)) for _ in range(_RESAMPLES)]
    told: dict[str, Any] = {"count": len(truth_N)}
    for name, figure in figures.items():
        value = figure(truth_N, answers_N)
        if value is None:
            told[name] = None
            continue
        drawn = [found for draw in draws if (found := figure(truth_N[draw], answers_N[draw])) is not None]
        low, high = np.percentile(drawn, (2.5, 97.5))
        told[name] = {"value": value, "count": len(truth_N), "interval_95": [float(low), float(high)]}
    return told


def spearman(truth_N: Floats, answers_N: Floats) -> float | None:
    """Correlation of ranks, equal values sharing the mean of theirs; None where one side is all equal."""
    ranks = [_ranks(values) - (len(values) + 1) / 2 for values in (truth_N, answers_N)]
    size = math.sqrt(float((ranks[0] ** 2).sum()) * float((ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / size if size else None


def _ranks(values_N: Floats) -> Floats:
    _, place_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[place_N]
    return ranks


def _mae(truth_N: Floats, answers_N: Floats) -> float | None:
    return float(np.abs(truth_N - answers_N).mean())


def _rmse(truth_N: Floats, answers_N: Floats) -> float | None:
    return math.sqrt(float(((truth_N - answers_N) ** 2).mean()))


def _r2(truth_N: Floats, answers_N: Floats) -> float | None:
    whole = float(((truth_N - truth_N.mean()) ** 2).sum())
    return 1 - float(((truth_N - answers_N) ** 2).sum()) / whole if whole else None
