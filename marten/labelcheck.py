"""Labels that are probably wrong: what a classifier says of pictures that it was not fitted on.

A pretrained network's features and a linear classifier on them, fitted in folds: each picture is judged by the fit of
the other folds. A label to which that fit gives little, and another much, deserves a look.

Source: Northcutt, Jiang and Chuang 2021, Confident Learning: the threshold of a class is the mean confidence in it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from marten.datasets import PictureSet, Sample
from marten.scores import Floats, Ints, softmax
from marten.streams import stream
from modelspec import ModelSpec

FOLDS = 5


@torch.inference_mode()
def features_of(
    network: nn.Module,
    head: str,
    spec: ModelSpec,
    samples: Sequence[Sample],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Floats:
    """What the network's head is given, per sample: float64 (pictures, features), each feature of deviation 1.

    Args:
        network: in eval mode, on the CPU.
        head: prefix of the parameters of its last layers, as the architecture names it.
        spec: of the network.
        samples: readable ones.
        progress: called with (done, total).
    """
    held: list[torch.Tensor] = []
    module = network.get_submodule(head.rstrip("."))
    handle = module.register_forward_pre_hook(lambda _module, inputs: held.append(inputs[0].flatten(1).double()))
    try:
        for done, sample in enumerate(samples, 1):
            network(spec.preprocess(sample.source()))
            progress(done, len(samples))
    finally:
        handle.remove()
    found: Floats = torch.cat(held).numpy()
    standard: Floats = (found - found.mean(0)) / np.maximum(found.std(0), 1e-9)
    return standard


def out_of_fold(features_NK: Floats, labels_N: Ints, classes: int, seed: int = 0) -> Floats:
    """Probabilities of each picture's classes by a linear fit of the other folds, float64 (pictures, classes).

    Equal features stay in one fold, so that no picture is judged by its own copy.
    """
    keys = [stream(seed, row.tobytes().hex()) for row in features_NK.round(6)]
    fold_N = np.array([key % FOLDS for key in keys])
    probs_NK = np.full((len(labels_N), classes), 1 / classes)
    for fold in np.unique(fold_N):
        inside_N = fold_N == fold
        if inside_N.all():
            continue
        weights = _fit(features_NK[~inside_N], labels_N[~inside_N], classes)
        probs_NK[inside_N] = softmax(features_NK[inside_N] @ weights[:-1] + weights[-1])
    return probs_NK


def suspects(labels_N: Ints, probs_NK: Floats) -> list[int]:
    """Indices of probably wrong labels, the most certain first.

    One is where another class reaches that class's threshold, the mean confidence in it of the pictures that bear it,
    and is likelier than the picture's own.
    """
    classes = probs_NK.shape[1]
    shares = [probs_NK[labels_N == k, k] for k in range(classes)]
    thresholds = np.array([share.mean() if len(share) else np.inf for share in shares])
    own_N = probs_NK[np.arange(len(labels_N)), labels_N]
    margin_N = np.where(probs_NK >= thresholds, probs_NK, -1).max(1) - own_N
    order = np.argsort(-margin_N, kind="stable")
    return [int(i) for i in order if margin_N[i] > 0]


def suspects_table(pictures: PictureSet, labels_N: Ints, probs_NK: Floats) -> str:
    """The suspects as CSV text: path, label, its probability, the likelier class and its probability."""
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(("path", "label", "p_label", "likelier", "p_likelier"))
    for i in suspects(labels_N, probs_NK):
        best = int(probs_NK[i].argmax())
        own, other = probs_NK[i, labels_N[i]], probs_NK[i, best]
        writer.writerow(
            (pictures.samples[i].id, pictures.labels[labels_N[i]], f"{own:.4f}", pictures.labels[best], f"{other:.4f}")
        )
    return rows.getvalue()


def _fit(features_NK: Floats, labels_N: Ints, classes: int) -> Floats:
    """Weights and, in the last row, biases of a ridge-penalised softmax regression."""
    inputs, targets = torch.from_numpy(features_NK), torch.from_numpy(labels_N)
    weights = torch.zeros(inputs.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = (
            nn.functional.cross_entropy(inputs @ weights[:-1] + weights[-1], targets) + 0.02 * weights.square().sum()
        )
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    fitted: Floats = weights.detach().numpy()
    return fitted
