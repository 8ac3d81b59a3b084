"""The learning rate of each step, in closed form: it needs no state, so a resumed run continues its curve."""

from __future__ import annotations

import math

from marten.errors import UsageError

SCHEDULES = ("constant", "cosine", "step", "onecycle", "finetune")
_WARM_UP = 0.05


def learning_rate_factor(schedule: str, step: int, steps: int, head_steps: int = 0) -> float:
    """What the base learning rate is multiplied by at `step` of `steps` (counted from 0).

    In the first `head_steps` only the head learns.

    constant  1
    cosine    linear warm-up over the first 5 % of steps, then half a cosine down to 0
    step      1, from half of the steps on 0.1, from three quarters on 0.01
    onecycle  half a cosine from 1/25 up to 1 over the first 30 %, then down to 1/10,000
              Source: Smith and Topin 2017 (arXiv 1708.07120), proportions as in torch's OneCycleLR
    finetune  one cycle for the head alone, then one of half the height for the whole network
              Source: fine_tune of fastai (Howard and Gugger 2020, arXiv 2002.04688)

    Raises:
        UsageError: an unknown schedule.
    """
    done = (step + 1) / max(steps, 1)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        if done <= _WARM_UP:
            return done / _WARM_UP
        return _half_cosine(1.0, 0.0, (done - _WARM_UP) / (1 - _WARM_UP))
    if schedule == "step":
        return 1.0 if done <= 0.5 else 0.1 if done <= 0.75 else 0.01
    if schedule == "onecycle":
        return _half_cosine(1 / 25, 1.0, done / 0.3) if done <= 0.3 else _half_cosine(1.0, 1e-4, (done - 0.3) / 0.7)
    if schedule == "finetune":
        if step < head_steps:
            return learning_rate_factor("onecycle", step, head_steps)
        return learning_rate_factor("onecycle", step - head_steps, steps - head_steps) / 2
    raise UsageError(f"--schedule must be one of {', '.join(SCHEDULES)}, found {schedule!r}")


def _half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2
