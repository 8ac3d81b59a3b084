"""State dicts: where a network's first weights come from, and how trained ones are put down with their card."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from marten.architectures import Architecture, architecture_file, build_network
from marten.errors import CardError, TrainingError
from marten.files import replacing, write_text
from modelspec import ModelCard, load_state_dict, sha256_file


def start_weights(network: torch.nn.Module, architecture: Architecture, weights: str) -> str:
    """Give a fresh network its first weights.

    Args:
        network: built for this run's classes.
        architecture: of the network.
        weights: "none"; "imagenet"; "auto", which is imagenet where there is such; or a state dict's path.

    Returns:
        Where they came from, for the card.

    Raises:
        TrainingError: ImageNet weights asked for and out of reach, or a file that fits nothing in the network.
    """
    if weights == "none" or (weights == "auto" and not architecture.pretrained):
        return "none"
    if weights in ("auto", "imagenet"):
        state, told = _imagenet_weights(architecture)
    elif Path(weights).is_file():
        state, told = load_state_dict(weights), Path(weights).name
    else:
        raise TrainingError(
            f"--weights takes auto, none, imagenet or a file of weights, and there is no file {weights}"
        )
    own = network.state_dict()
    fitting = {name: t for name, t in state.items() if name in own and own[name].shape == t.shape}
    missing = [name for name in own if name not in fitting and not name.startswith(architecture.head)]
    if missing:
        raise TrainingError(
            f"{told} does not fit {architecture.name}: {len(missing)} of its {len(own)} tensors are missing or of"
            f" another shape, the first {missing[0]}"
        )
    network.load_state_dict(fitting, strict=False)
    return told


def _imagenet_weights(architecture: Architecture) -> tuple[dict[str, torch.Tensor], str]:
    source = architecture.pretrained
    if not source:
        raise TrainingError(f"there are no ImageNet weights for {architecture.name}: use --weights none or a file")
    if "package" in source:
        path = packaged_weights(architecture)
        return load_state_dict(path), source["package"].partition(":")[0].replace("_", "-")
    if "timm" in source:
        return _timm_weights(architecture), f"timm {source['timm']}"
    from torchvision.models import get_model, get_weight

    try:
        weights = get_weight(source["torchvision"])
        if "name" in architecture.arch_args:  # torchvision's own network puts old names of layers right
            state = get_model(architecture.arch_args["name"], weights=weights).state_dict()
        else:
            state = weights.get_state_dict(progress=True, check_hash=True)
        return dict(state), source["torchvision"]
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "reason", error)
        raise TrainingError(
            f"ImageNet weights of {architecture.name} ({source['torchvision']}) cannot be fetched: {reason}."
            " Give a local file with --weights FILE, or train from scratch with --weights none"
        ) from error


def _timm_weights(architecture: Architecture) -> dict[str, torch.Tensor]:
    import timm

    try:
        return dict(timm.create_model(architecture.pretrained["timm"], pretrained=True).state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"weights of {architecture.name} cannot be fetched from timm's hub: {reason}."
            " Give a local file with --weights FILE, or train from scratch with --weights none"
        ) from error


def packaged_weights(architecture: Architecture) -> Path:
    """Path of the ImageNet weights that a package brings.

    Raises:
        TrainingError: the network has no such package, or it is not installed.
    """
    if "package" not in architecture.pretrained:
        raise TrainingError(f"no package holds weights of {architecture.name}")
    package, _, inside = architecture.pretrained["package"].partition(":")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        missing = package.replace("_", "-")
        raise TrainingError(f"install {missing}, which holds the ImageNet weights of {architecture.name}")
    return Path(spec.origin).parent / inside


def save_model(path: Path, network_state: Mapping[str, torch.Tensor], card: ModelCard) -> ModelCard:
    """Write a bare state dict and, beside it, its card; each whole or not at all.

    Equal tensors give equal bytes, whatever the file is called.

    Returns:
        The card with the sha256 of the written weights.

    Raises:
        MartenError: the folder cannot be written.
    """
    buffer = io.BytesIO()
    # copied into fresh tensors: a 1x1 kernel in channels_last memory counts as contiguous, yet keeps other strides
    plain = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in network_state.items()}
    torch.save(plain, buffer)
    with replacing(path) as neighbour:
        neighbour.write_bytes(buffer.getbuffer())
    card = replace(card, weights_sha256=sha256_file(path))
    write_text(path.with_suffix(".json"), card.to_json())
    return card


def load_model(path: Path) -> tuple[torch.nn.Module, ModelCard]:
    """Build the network of a trained model from its card and weights, ready to answer.

    Returns:
        (network in eval mode on the CPU, its card).

    Raises:
        CardError: no card, no weights, weights that are not the card's, or that do not fit its architecture.
    """
    path = Path(path)
    card = ModelCard.read(path.with_suffix(".json"))
    state = load_state_dict(path)
    if sha256_file(path) != card.weights_sha256:
        raise CardError(f"{path} is not the file that its card describes (sha256 differs): train or copy both together")
    architecture_file(card.spec.arch)
    network = build_network(card.spec.arch, card.spec.arch_args)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CardError(f"{path} does not fit {card.spec.arch}({dict(card.spec.arch_args)}): {error}") from error
    return network.eval(), card
