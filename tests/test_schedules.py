"""The learning rate is a closed formula of the step."""

from __future__ import annotations

import math

import pytest

from marten.errors import UsageError
from marten.schedules import SCHEDULES, learning_rate_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_factors_stay_between_0_and_1_and_reach_1(schedule: str) -> None:
    factors = [learning_rate_factor(schedule, step, 200, head_steps=100) for step in range(200)]
    assert max(factors) == pytest.approx(1.0)
    assert min(factors) >= 0


def test_cosine_warms_up_and_ends_at_nothing() -> None:
    assert learning_rate_factor("cosine", 0, 200) == pytest.approx(0.1)
    assert learning_rate_factor("cosine", 9, 200) == pytest.approx(1.0)
    middle = (104 - 9) / 190
    assert learning_rate_factor("cosine", 104, 200) == pytest.approx((1 + math.cos(math.pi * middle)) / 2)
    assert learning_rate_factor("cosine", 199, 200) == pytest.approx(0.0, abs=1e-12)


def test_step_falls_at_half_and_three_quarters() -> None:
    assert [learning_rate_factor("step", s, 100) for s in (0, 49, 50, 74, 75, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_onecycle_rises_over_30_percent() -> None:
    factors = [learning_rate_factor("onecycle", step, 100) for step in range(100)]
    assert factors.index(max(factors)) == 29
    assert factors[-1] == pytest.approx(1e-4)


def test_an_unknown_schedule_is_misuse() -> None:
    with pytest.raises(UsageError, match="onecycle"):
        learning_rate_factor("linear", 0, 1)
