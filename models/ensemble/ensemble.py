"""Ensemble: trained networks that answer as one, by the mean of their probabilities, or of their scores.

Never trained: scripts/sweep ensemble makes one of runs that are finished. The file of each member's architecture lies
beside this one in an archive, and in its own folder in the repository. Input: that of the members.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from pathlib import Path

import torch
from torch import nn

VARIANTS = {}
HEAD = "members"
PREPROCESS = {}
PRETRAINED = {}


class Ensemble(nn.Module):
    """Several networks as one.

    Args:
        members: of each network its `arch`, its `arch_args`, and what its card does with its outputs: `temperature`,
            `mirror`, `score_scale`, `score_offset`.
        task: "classification" or "regression".
    """

    def __init__(self, members: list, task: str = "classification") -> None:
        super().__init__()
        self.members = nn.ModuleList([_network_class(one["arch"])(**one["arch_args"]) for one in members])
        self.cards = [dict(one) for one in members]
        self.task = task

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Map float32 images to the logarithm of the mean probabilities (batch, classes), or mean scores (batch, 1)."""
        told = []
        for network, card in zip(self.members, self.cards):  # noqa: B905  Python 3.9 knows no strict
            out = network(images_NCHW).float()
            if card["mirror"]:
                out = (out + network(images_NCHW.flip(3)).float()) / 2
            if self.task == "regression":
                told.append(out * card["score_scale"] + card["score_offset"])
            else:
                told.append((out / card["temperature"]).log_softmax(1))
        if self.task == "regression":
            return torch.stack(told).mean(0)
        return torch.stack(told).logsumexp(0) - math.log(len(told))


def _network_class(arch: str) -> type:
    """The one class of an architecture's file."""
    here = Path(__file__).resolve().parent
    path = here / f"{arch}.py"
    if not path.is_file():
        path = here.parent / arch / f"{arch}.py"
    spec = importlib.util.spec_from_file_location(f"member_{arch}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (found,) = [one for _, one in inspect.getmembers(module, inspect.isclass) if one.__module__ == module.__name__]
    return found
