"""How well classes are told apart: loss, accuracy, top-k, macro F1 and class precision from one table of counts."""

from __future__ import annotations

from typing import Any

import torch


class Scores:
    """Counts over the crops seen so far, which can be saved and continued.

    Args:
        classes: how many.
        k: of the top-k accuracy.
        state: of `state`, to go on from.
    """

    def __init__(self, classes: int, k: int, state: dict[str, Any] | None = None) -> None:
        self.k = k
        self.confusion_KK = torch.zeros((classes, classes), dtype=torch.int64)
        """Rows are the true class, columns the likeliest one."""
        self.loss_sum, self.top_k_hits = 0.0, 0
        if state is not None:
            self.confusion_KK = state["confusion"].clone()
            self.loss_sum, self.top_k_hits = float(state["loss_sum"]), int(state["top_k_hits"])

    def add(self, probs_NK: torch.Tensor, labels_N: torch.Tensor, loss_sum: float) -> None:
        """Add a batch: probabilities, true classes, and the sum of its losses."""
        self.loss_sum += loss_sum
        best = probs_NK.topk(self.k, dim=1).indices
        self.top_k_hits += int((best == labels_N[:, None]).any(1).sum())
        ones = torch.ones(len(labels_N), dtype=torch.int64)
        self.confusion_KK.index_put_((labels_N, probs_NK.argmax(1)), ones, accumulate=True)

    def state(self) -> dict[str, Any]:
        """Plain numbers and a tensor from which the counts can be continued."""
        return {"confusion": self.confusion_KK, "loss_sum": self.loss_sum, "top_k_hits": self.top_k_hits}

    @property
    def count(self) -> int:
        """Crops seen."""
        return int(self.confusion_KK.sum())

    @property
    def hits(self) -> int:
        """Crops whose likeliest class was right."""
        return int(self.confusion_KK.diag().sum())

    @property
    def loss(self) -> float:
        """Mean loss per crop."""
        return self.loss_sum / max(self.count, 1)

    @property
    def accuracy(self) -> float:
        """Share of crops whose likeliest class was right."""
        return self.hits / max(self.count, 1)

    @property
    def top_k_accuracy(self) -> float:
        """Share of crops whose class was among the k likeliest."""
        return self.top_k_hits / max(self.count, 1)

    @property
    def balanced_accuracy(self) -> float:
        """Mean over classes of the share found, classes that do not occur left out."""
        totals = self.confusion_KK.sum(1)
        present = totals > 0
        return float((self.confusion_KK.diag()[present] / totals[present]).mean())

    @property
    def class_precision(self) -> float:
        """Mean over classes of the share of right ones among those taken for it; 0 for a class never named."""
        named = self.confusion_KK.sum(0).clamp(min=1)
        return float((self.confusion_KK.diag() / named).mean())

    @property
    def macro_f1(self) -> float:
        """Mean over classes of the harmonic mean of precision and share found."""
        both = self.confusion_KK.sum(0) + self.confusion_KK.sum(1)
        present = both > 0
        return float((2 * self.confusion_KK.diag()[present] / both[present]).mean())

    def summary(self) -> dict[str, int]:
        """Hits and count, for an interval."""
        return {"hits": self.hits, "count": self.count}
