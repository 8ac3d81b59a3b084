"""The best weights of a run so far, and the file, with its card, that they are kept in."""

from __future__ import annotations

import math
from typing import Any

import torch

from marten.material import Material
from marten.metrics import share_with_interval
from marten.objectives import MEASURES
from marten.progress import say
from marten.provenance import provenance
from marten.settings import Settings
from marten.weights import save_model
from modelspec import ModelCard


class Best:
    """What a run has to show.

    Args:
        settings: of the run; --model_path is where the weights go.
        material: what it learns from; without validation pictures the training loss decides.
        origin: where the first weights came from, for the card.
        is_writer: whether this process writes: of several, the first.

    Attributes:
        loss: by which it is the best.
        epoch: of it, from 0; -1 before there is one.
        weights: state dict on the CPU.
    """

    def __init__(self, settings: Settings, material: Material, origin: str, is_writer: bool = True) -> None:
        self._settings, self._material, self._origin, self._is_writer = settings, material, origin, is_writer
        self._measure = MEASURES[material.spec.task]
        self.loss, self.epoch = math.inf, -1
        self.weights: dict[str, torch.Tensor] | None = None

    def offer(self, network: torch.nn.Module, measured: dict[str, Any], loss: float) -> None:
        """Take the network's weights after an epoch, if its loss is none worse, and write them.

        Args:
            network: that was judged.
            measured: the epoch's row of metrics.jsonl.
            loss: of it, the validation's where there is one.
        """
        if loss > self.loss:
            return
        kind = "Val" if self._material.validation else "Train"
        say(f"{kind} loss decreased {self.loss:.6f} --> {loss:.6f}. Saving model at {self._settings.weights_path}")
        self.loss, self.epoch = loss, measured["epoch"] - 1
        self.weights = {name: t.detach().cpu().clone() for name, t in network.state_dict().items()}
        self.write(measured)

    def write(self, measured: dict[str, Any]) -> None:
        """Write the weights and a card that tells what was measured of them."""
        if not self._is_writer:
            return
        assert self.weights is not None
        save_model(self._settings.weights_path, self.weights, self._card(measured))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"loss": self.loss, "epoch": self.epoch, "state": self.weights}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to what `state` gave."""
        self.loss, self.epoch, self.weights = state["loss"], state["epoch"], state["state"]

    def _card(self, measured: dict[str, Any]) -> ModelCard:
        metrics: dict[str, Any] = {}
        if self._material.validation:
            value, count = measured[f"validation_{self._measure}"], measured["validation_count"]
            is_share = self._measure == "accuracy"
            told = share_with_interval(round(value * count), count) if is_share else {"value": value, "count": count}
            metrics[f"validation_{self._measure}"] = told
            metrics["validation_loss"] = {"value": measured["validation_loss"], "count": measured["validation_count"]}
        return ModelCard(
            spec=self._material.spec,
            weights_sha256="",
            data=self._material.told(),
            training={**self._settings.shaping(), "started_from": self._origin, "best_epoch": self.epoch + 1},
            metrics=metrics,
            provenance=provenance(),
        )
