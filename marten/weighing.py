"""How much the error of each score counts in training: by its votes, by how rare such scores are, or both."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from marten.datasets import Sample
from marten.errors import DataError

_BINS = 10
_MOST = 10.0
"""How many times the mean a picture may count at most, so that no single one steers a step."""


def weigh(training: Sequence[Sample], by: Sequence[str]) -> list[Sample]:
    """Give each sample the weight of its error; their mean is 1.

    votes   in proportion to the votes behind the score: the variance of a mean falls with their number
    tenths  so that each tenth of the range of scores counts the same as a whole, however many pictures lie in it

    Args:
        training: samples with scores.
        by: "votes", "tenths" or both, whose weights are then multiplied.

    Returns:
        The samples with their `weight`, none above ten times the mean of its own kind; unchanged when `by` is empty.

    Raises:
        DataError: votes are asked for, and the table has none.
    """
    weights = [1.0] * len(training)
    if "votes" in by:
        unknown = sum(not s.votes for s in training)
        if unknown:
            raise DataError(
                f"--weigh votes: {unknown} of {len(training)} pictures have no votes: the table needs the column votes,"
                " with a number above 0 in each row"
            )
        weights = _times(weights, [float(s.votes) for s in training])
    if "tenths" in by:
        scores = [s.score for s in training if s.score is not None]
        low, high = min(scores), max(scores)
        tenths = [min(int((score - low) / (high - low) * _BINS), _BINS - 1) for score in scores]
        counts = Counter(tenths)
        weights = _times(weights, [1 / counts[tenth] for tenth in tenths])
    mean = statistics.fmean(weights)
    return [replace(s, weight=weight / mean) for s, weight in zip(training, weights, strict=True)]


def _times(weights: Sequence[float], factors: Sequence[float]) -> list[float]:
    capped = list(factors)
    while max(capped) > 1.001 * _MOST * (mean := statistics.fmean(capped)):  # capping lowers the mean, so again
        capped = [min(factor, _MOST * mean) for factor in capped]
    return [weight * factor for weight, factor in zip(weights, capped, strict=True)]
