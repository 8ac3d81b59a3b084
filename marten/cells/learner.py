"""What learns of single cells: a network with its optimizer, one step at a time, and the judge of what it learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from marten.architectures import build_network
from marten.cells.augment import augment
from marten.cells.config import Config
from marten.cells.crop_batches import CropSet
from marten.cells.recipe import first_weights, learning_rate, make_optimizer
from marten.cells.scores import Scores
from marten.devices import Runtime
from marten.errors import TrainingError
from marten.streams import stream
from modelspec import ModelSpec

Rows = NDArray[np.intp]


class CellLearner:
    """A network of cells in training.

    Args:
        config: names optimizer, schedule, augmentation and labels.
        crops: whose rows it learns.
        spec: of the network.
        runtime: device and precision.
        seed: of everything random.

    Attributes:
        network: on the device, in channels_last memory.
        origin: where its first weights came from.
        soft: labels that the network's own predictions move as it learns, (rows, classes); None without them.

    Raises:
        MartenError: first weights or a schedule that cannot be used.
    """

    def __init__(self, config: Config, crops: CropSet, spec: ModelSpec, runtime: Runtime, seed: int) -> None:
        self._config, self._crops, self._runtime, self._seed = config, crops, runtime, seed
        self._top_k = min(int(config["train.validation.top_k"]), len(crops.labels))
        torch.manual_seed(stream(seed, "weights"))
        network = build_network(spec.arch, spec.arch_args)
        self.origin = first_weights(config, network)
        self.network = network.to(runtime.device).to(memory_format=torch.channels_last)
        self._optimizer = make_optimizer(config, self.network)
        learning_rate(config, 0, ())  # refuses an unknown schedule now
        online = config["train.model.crop_generator"] == "online_labels_cropgen"
        self.soft = self._first_labels() if online else None

    @property
    def lr(self) -> float:
        """The learning rate of the epoch."""
        return float(self._optimizer.param_groups[0]["lr"])

    def scores(self, state: Any = None) -> Scores:
        """Empty, or as they were saved."""
        return Scores(len(self._crops.labels), self._top_k, state)

    def begin_epoch(self, epoch: int, losses: Sequence[float]) -> None:
        """Set the learning rate, from the validation losses of the epochs before, and learn from now on."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._config, epoch, losses)
        self.network.train()

    def learn(self, crops_NCHW: torch.Tensor, rows: Rows, epoch: int, batch: int, seen: Scores) -> None:
        """Take one step on the crops of some rows, and add what the network said of them to `seen`.

        Raises:
            TrainingError: a loss that is no number.
        """
        place = stream(self._seed, "step", epoch, batch)
        # whole blocks drop by these numbers: a function of the place in the run, so nothing of it is saved
        torch.manual_seed(place)
        images_NCHW = crops_NCHW.to(self._runtime.device, non_blocking=True)
        if self._config["train.model.augmentations"]:
            images_NCHW = augment(images_NCHW, torch.Generator().manual_seed(place))
        labels_N = torch.from_numpy(self._crops.targets[rows])
        with self._runtime.autocast():
            logits_NK = self.network(images_NCHW.to(memory_format=torch.channels_last)).float()
        loss = self._loss(logits_NK, labels_N, rows)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {float(loss.detach())} in epoch {epoch}, batch {batch}: lower "
                "train.model.params.learning_rate, or run scripts/cells check"
            )
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        probs_NK = logits_NK.detach().softmax(1).cpu()
        seen.add(probs_NK, labels_N, float(loss.detach()) * len(labels_N))
        if self.soft is not None:
            share = float(self._config["train.model.params.online_lambda"])
            self.soft[rows] = (1 - share) * self.soft[rows] + share * probs_NK

    @torch.inference_mode()
    def judge(self, batches: Iterable[torch.Tensor], rows: Rows, size: int, stop: Callable[[], bool]) -> Scores | None:
        """What the network makes of some rows, in batches of `size`; None as soon as `stop` says so."""
        self.network.eval()
        scores = self.scores()
        for number, crops_NCHW in enumerate(batches):
            if stop():
                return None
            images_NCHW = crops_NCHW.to(self._runtime.device).to(memory_format=torch.channels_last)
            with self._runtime.autocast():
                logits_NK = self.network(images_NCHW).float().cpu()
            labels_N = torch.from_numpy(self._crops.targets[rows[number * size : (number + 1) * size]])
            loss = float(nn.functional.cross_entropy(logits_NK, labels_N, reduction="sum"))
            scores.add(logits_NK.softmax(1), labels_N, loss)
        return scores

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"network": self.network.state_dict(), "optimizer": self._optimizer.state_dict(), "soft": self.soft}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to what `state` gave."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.soft = state["soft"]

    def _loss(self, logits_NK: torch.Tensor, labels_N: torch.Tensor, rows: Rows) -> torch.Tensor:
        if self.soft is not None:
            return nn.functional.cross_entropy(logits_NK, self.soft[rows].to(logits_NK.device))
        smoothing = float(self._config["train.model.params.label_smoothing"])
        return nn.functional.cross_entropy(logits_NK, labels_N.to(logits_NK.device), label_smoothing=smoothing)

    def _first_labels(self) -> torch.Tensor:
        smoothing = float(self._config["train.model.params.online_label_smoothing"])
        classes = len(self._crops.labels)
        labels_NK = torch.full((len(self._crops.targets), classes), smoothing / classes)
        labels_NK[torch.arange(len(labels_NK)), torch.from_numpy(self._crops.targets)] += 1 - smoothing
        return labels_NK
