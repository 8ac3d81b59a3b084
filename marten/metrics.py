"""What a run is judged by: sample-weighted means that can be stopped and continued, and intervals for shares."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from marten.distributed import World


class Running:
    """Loss and accuracy over the samples seen so far, summed on the device without waiting for it."""

    def __init__(self, device: torch.device, state: Mapping[str, float] | None = None) -> None:
        # float64 sums in a fixed order: the same number whether or not the epoch was interrupted
        # (mps has no float64)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = [state["loss_sum"], state["correct"]] if state else [0.0, 0.0]
        self._sums = torch.tensor(values, dtype=dtype, device=device)
        self.count = int(state["count"]) if state else 0

    def add(self, losses_N: torch.Tensor, correct_N: torch.Tensor) -> None:
        """Add per-sample losses and per-sample hits (bool), each of shape (batch,)."""
        sums = torch.stack([losses_N.detach().to(self._sums.dtype).sum(), correct_N.to(self._sums.dtype).sum()])
        self._sums += sums
        self.count += losses_N.shape[0]

    def state(self) -> dict[str, float]:
        """Plain numbers from which the sums can be continued."""
        loss_sum, correct = self._sums.tolist()
        return {"loss_sum": loss_sum, "correct": correct, "count": self.count}

    def together(self, world: World) -> Running:
        """What all processes have seen, each its own pictures; the same numbers in every one."""
        states = world.gather(self.state())
        return Running(self._sums.device, {name: sum(state[name] for state in states) for name in states[0]})

    @property
    def loss(self) -> float:
        """Mean loss per sample; nan before the first."""
        return self.state()["loss_sum"] / self.count if self.count else math.nan

    @property
    def accuracy(self) -> float:
        """Share of samples whose likeliest class was right; nan before the first."""
        return self.state()["correct"] / self.count if self.count else math.nan


def wilson_interval(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a share that holds the true one with 95 % confidence.

    Source: Wilson 1927; keeps its coverage near 0 and 1, where the normal interval does not.
    """
    if count == 0:
        return 0.0, 1.0
    share = hits / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale


def share_with_interval(hits: int, count: int) -> dict[str, float | int | list[float]]:
    """A share as the card tells it: value, how many of how many, and its 95 % Wilson interval."""
    low, high = wilson_interval(hits, count)
    return {"value": hits / max(count, 1), "hits": hits, "count": count, "interval_95": [low, high]}
