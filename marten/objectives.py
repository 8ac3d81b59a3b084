"""What a network is trained towards, and by what it is judged besides its loss: classes or a score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from modelspec import ModelSpec

MEASURES = {"classification": "accuracy", "regression": "mae"}
"""What the second figure beside the loss is called, in metrics.jsonl and on curves: mae is in the answers' units."""


class Objective(Protocol):
    """Per-picture losses, and the figures whose mean is the task's measure."""

    def losses(self, outputs_NK: torch.Tensor, targets_N: torch.Tensor, training: bool) -> torch.Tensor:
        """Losses of shape (batch,); regularised and weighted ones in training."""

    def worth(self, outputs_NK: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Hits, or absolute errors, of shape (batch,)."""


@dataclass(frozen=True)
class Classes:
    """Cross-entropy, and whether the likeliest class is right."""

    label_smoothing: float = 0.0

    def losses(self, outputs_NK: torch.Tensor, targets_N: torch.Tensor, training: bool) -> torch.Tensor:
        """Cross-entropy; labels are smoothed in training alone."""
        smoothing = self.label_smoothing if training else 0.0
        return functional.cross_entropy(outputs_NK.float(), targets_N, reduction="none", label_smoothing=smoothing)

    def worth(self, outputs_NK: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """True where the likeliest class is the picture's."""
        return outputs_NK.argmax(1) == targets_N


@dataclass(frozen=True)
class Scores:
    """Squared or Huber error of scores brought to mean 0 and deviation 1, and the absolute error in their own units.

    Targets are scores of shape (batch,), or scores and the weights of their errors, of shape (batch, 2).

    Attributes:
        offset: mean of the training part's scores.
        scale: their standard deviation.
        huber: whether errors beyond one deviation count linearly instead of squared.
    """

    offset: float
    scale: float
    huber: bool = False

    def losses(self, outputs_NK: torch.Tensor, targets_N: torch.Tensor, training: bool) -> torch.Tensor:
        """Squared or Huber error in units of the deviation, times the weight where targets bring one."""
        wanted_N = (_scores(targets_N) - self.offset) / self.scale
        loss = functional.huber_loss if self.huber else functional.mse_loss
        losses_N = loss(outputs_NK[:, 0].float(), wanted_N, reduction="none")
        return losses_N if targets_N.ndim == 1 else losses_N * targets_N[:, 1].float()

    def worth(self, outputs_NK: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Distance of answer and score."""
        return (outputs_NK[:, 0].float() * self.scale + self.offset - _scores(targets_N)).abs()


def _scores(targets_N: torch.Tensor) -> torch.Tensor:
    return (targets_N if targets_N.ndim == 1 else targets_N[:, 0]).float()


def objective_of(spec: ModelSpec, label_smoothing: float, loss: str) -> Objective:
    """What a model of this task is trained towards; `loss` is "auto", "mse" or "huber"."""
    if spec.task == "regression":
        return Scores(spec.score_offset, spec.score_scale, loss == "huber")
    return Classes(label_smoothing)
