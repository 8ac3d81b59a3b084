"""Several trained models made into one that answers with the mean of their answers: weights, card, and so an archive.

The members must have the same labels and take the same pictures; their architectures may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from marten.errors import UsageError
from marten.provenance import provenance
from marten.weights import load_model, save_model
from modelspec import ModelCard

ARCH = "ensemble"
_SHARED = ("task", "labels", "preprocess")


def make_ensemble(weights: Sequence[Path], output: Path, name: str = ARCH) -> ModelCard:
    """Write the ensemble of several models as a state dict with its card.

    Args:
        weights: state dicts, each with its card beside it.
        output: state dict to write.
        name: of the endpoint.

    Returns:
        Its card. Where all members held out the same pictures of the same set, it tells which, so that
        scripts/evaluate judges the ensemble by those; else it tells no set at all.

    Raises:
        UsageError: fewer than two models, or models that differ in task, labels or preprocessing.
        CardError: a model that cannot be read.
    """
    if len(weights) < 2:
        raise UsageError(f"an ensemble is made of two models or more, found {len(weights)}")
    cards: list[ModelCard] = []
    state: dict[str, torch.Tensor] = {}
    for i, path in enumerate(weights):
        network, card = load_model(path)
        if card.spec.arch == ARCH or card.spec.task == "embedding":
            raise UsageError(f"{path} is of the kind {card.spec.arch}, {card.spec.task}: it cannot be a member")
        for what in _SHARED:
            if cards and getattr(card.spec, what) != getattr(cards[0].spec, what):
                raise UsageError(f"{path} and {weights[0]} differ in {what}: an ensemble's members share it")
        cards.append(card)
        state |= {f"members.{i}.{key}": value for key, value in network.state_dict().items()}
    spec = replace(
        cards[0].spec,
        name=name,
        arch=ARCH,
        arch_args={"task": cards[0].spec.task, "members": [_member(card) for card in cards]},
        temperature=1.0,
        mirror=False,
        score_scale=1.0,
        score_offset=0.0,
    )
    held_out = _held_out(cards)
    training: dict[str, Any] = {
        **held_out,
        "members": [
            {"file": path.name, "weights_sha256": card.weights_sha256, "training": dict(card.training)}
            for path, card in zip(weights, cards, strict=True)
        ],
    }
    data = cards[0].data if held_out else {}
    return save_model(output, state, ModelCard(spec, "", data, training, {}, provenance()))


def _member(card: ModelCard) -> dict[str, Any]:
    spec = card.spec
    return {
        "arch": spec.arch,
        "arch_args": dict(spec.arch_args),
        "temperature": spec.temperature,
        "mirror": spec.mirror,
        "score_scale": spec.score_scale,
        "score_offset": spec.score_offset,
    }


def _held_out(cards: Sequence[ModelCard]) -> dict[str, Any]:
    """Seed and share of the split where all members made the same one, else nothing."""
    splits = [(c.data.get("digest"), c.training.get("seed"), c.training.get("validation_split")) for c in cards]
    if None in splits[0] or any(split != splits[0] for split in splits):
        return {}
    return {"seed": splits[0][1], "validation_split": splits[0][2]}
