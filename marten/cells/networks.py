"""The network that profiles cells: DeepProfiler's checkpoint, one of ours with its card, or one that knows ImageNet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from marten.cells.config import Config
from marten.cells.errors import CellsError
from marten.cells.project import Project
from modelspec import sha256_file

if TYPE_CHECKING:
    import torch

TRAINED = "model.pth"
"""What `train` writes to outputs/EXP/checkpoint, beside its card model.json."""
_CLASS_LAYERS = ("ClassProb", "Compound", "classifier", "probabilities")
_POOLS = ("pool5", "avg_pool")


@dataclass(frozen=True)
class Profiler:
    """A network ready to profile.

    Attributes:
        network: in eval mode, on the CPU.
        name: that becomes the prefix of the feature columns and Metadata_Model.
        layer: whose output is the profile.
        origin: where its weights come from, with their digest; a profile of other weights is another profile.
        repeats: ImageNet mode: every channel is shown alone, resized to `size_px`, as three equal colours.
        size_px: side of the input in ImageNet mode.
        labels: class names when the layer is the class layer and they are known.
    """

    network: torch.nn.Module
    name: str
    layer: str
    origin: str
    repeats: bool = False
    size_px: int = 224
    labels: tuple[str, ...] = ()


def find_checkpoint(project: Project, told: str | None = None) -> Path | None:
    """Path of the weights to profile with: the option, or else what the configuration says.

    Returns:
        None for ImageNet weights.

    Raises:
        CellsError: there is no such file, with those that are there.
    """
    name = told if told is not None else str(project.config.need("profile.checkpoint", "load the network"))
    if name == "None":
        return None
    folder = project.checkpoints
    names = (TRAINED,) if name in ("best", "model") else (name,)
    for path in (*(folder / each for each in names), Path(name)):
        if path.is_file():
            return path
    there = sorted(p.name for p in folder.glob("*") if p.suffix in (".pth", ".hdf5", ".h5")) if folder.is_dir() else []
    hint = f"there are {', '.join(there)}" if there else "it is empty: run scripts/cells train, or copy weights there"
    raise CellsError(f"no weights {name!r} in {folder} (profile.checkpoint): {hint}")


def load_profiler(
    project: Project, checkpoint: str | None = None, layer: str | None = None, imagenet: str | None = None
) -> Profiler:
    """Load the network that the configuration and the options name.

    Args:
        project: whose configuration, and whose checkpoints.
        checkpoint: file in outputs/EXP/checkpoint or path; replaces profile.checkpoint.
        layer: replaces profile.feature_layer.
        imagenet: name of a network with ImageNet weights, used for the checkpoint "None".

    Raises:
        CellsError: weights, channels or layer that do not fit each other.
    """
    config = project.config
    wanted = layer or str(config["profile.feature_layer"])
    path = None if imagenet else find_checkpoint(project, checkpoint)
    name = str(config["train.model.name"])
    if path is None:
        return _load_imagenet(config, wanted, imagenet)
    origin = f"{path.name} sha256 {sha256_file(path)}"
    labels: tuple[str, ...] = ()
    if path.suffix in (".hdf5", ".h5"):
        network = _load_keras(config, path)
    else:
        from marten.weights import load_model

        network, card = load_model(path)
        labels = tuple(card.spec.labels)
        trained_on = card.data.get("channels", config.channels)
        if list(trained_on) != config.channels:
            raise CellsError(
                f"{path} was trained on the channels {trained_on}, the configuration has {config.channels}"
            )
    known = _known_layer(network, wanted, config.target)
    return Profiler(network.eval(), name, known, origin, labels=labels if known == "ClassProb" else ())


def network_args(config: Config) -> tuple[str, dict[str, Any]]:
    """Folder below models/ and constructor arguments, without classes, of the network that the configuration names.

    Raises:
        CellsError: conv_blocks is no size of that network.
    """
    name, blocks = config["train.model.name"], config["train.model.params.conv_blocks"]
    channels = len(config.channels)
    if name == "efficientnet":
        return "efficientnet", {"size": blocks, "channels": channels}
    if name == "resnet":
        if blocks not in (50, 101, 152):
            raise CellsError(f"train.model.params.conv_blocks is {blocks}, but resnet is 50, 101 or 152 layers deep")
        return "resnet_v2", {"depth": blocks, "channels": channels}
    if blocks < 1:
        raise CellsError(f"train.model.params.conv_blocks is {blocks}, but the cnn needs one block or more")
    dim = config["train.model.params.feature_dim"]
    return "cell_cnn", {"blocks": blocks, "feature_dim": dim, "channels": channels}


def layer_output(network: torch.nn.Module, crops_NCHW: torch.Tensor, layer: str) -> torch.Tensor:
    """Output of a layer, convolutional ones averaged over space: float32 of shape (cells, features)."""
    given: Callable[..., torch.Tensor] | None = getattr(network, "features", None)
    if hasattr(network, "layers") and callable(given):
        found = given(crops_NCHW, layer)
    else:
        found = _hooked(network, crops_NCHW, layer)
    found = found.float()
    return found.mean((2, 3)) if found.ndim == 4 else found


def fuse(network: torch.nn.Module, layer: str) -> torch.nn.Module:
    """A copy of a network in which every batch norm is part of the convolution before it: a sixth less to compute.

    Networks whose layers have other names than Keras gives them come back as they are, and so do all when the layer
    asked for lies between a convolution and its batch norm.
    """
    import copy

    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    if layer.endswith("conv"):
        return network
    fused = copy.deepcopy(network)
    modules = dict(fused.named_children())
    for name, module in modules.items():
        norm_name = name.removesuffix("dwconv").removesuffix("conv") + "bn"
        norm = modules.get(norm_name)
        if name.endswith("conv") and isinstance(module, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(fused, name, fuse_conv_bn_eval(module, norm))
            setattr(fused, norm_name, nn.Identity())
    return fused


def repeat_channels(crops_NCHW: torch.Tensor, size_px: int) -> torch.Tensor:
    """Show every channel alone: (cells x channels, 3, size, size) of values in -1..1, channels of a cell in a row."""
    from torch.nn import functional

    cells, channels, height, width = crops_NCHW.shape
    single = crops_NCHW.reshape(cells * channels, 1, height, width)
    single = functional.interpolate(single, size=(size_px, size_px), mode="bilinear", align_corners=False)
    low, high = single.amin((2, 3), keepdim=True), single.amax((2, 3), keepdim=True)
    return ((single - low) / (high - low + 1e-7) * 2 - 1).expand(-1, 3, -1, -1)


def _load_keras(config: Config, path: Path) -> torch.nn.Module:
    from marten.architectures import build_network
    from marten.cells.keras_weights import keras_classes, keras_state

    arch, args = network_args(config)
    probe = build_network(arch, {**args, "num_classes": 2})
    network = build_network(arch, {**args, "num_classes": keras_classes(path, probe)})
    network.load_state_dict(keras_state(path, network))
    return network


def _load_imagenet(config: Config, layer: str, imagenet: str | None) -> Profiler:
    from marten.architectures import build_network, find_architecture
    from marten.weights import start_weights

    name = imagenet or "resnet50"
    if imagenet is None and config["train.model.name"] == "resnet":
        name = f"resnet{config['train.model.params.conv_blocks']}"
    architecture = find_architecture(name)
    network = build_network(architecture.arch, {**architecture.arch_args, "num_classes": 1000})
    told = start_weights(network, architecture, "imagenet")
    size = config["profile.use_pretrained_input_size"] or 224
    known = _known_layer(network, layer, config.target)
    if known == "ClassProb":
        raise CellsError("profile.feature_layer is the class layer, but ImageNet's classes are no treatments")
    return Profiler(network.eval(), name, known, f"{name} with {told}", repeats=True, size_px=int(size))


def _known_layer(network: torch.nn.Module, layer: str, target: str) -> str:
    """The layer under the name that the network uses for it.

    Raises:
        CellsError: it has none such; lists some.
    """
    import difflib

    if layer in (*_CLASS_LAYERS, target):
        return "ClassProb"
    known = list(getattr(network, "layers", [])) or [name for name, _ in network.named_modules() if name]
    if layer in known:
        return layer
    if layer in _POOLS:
        return "pool5" if "pool5" in known else "avg_pool"
    near = difflib.get_close_matches(layer, known, n=4) or known[-6:]
    raise CellsError(f"the network has no layer {layer!r} (profile.feature_layer); for instance {', '.join(near)}")


def _hooked(network: torch.nn.Module, x: torch.Tensor, layer: str) -> torch.Tensor:
    """Output of a module of a network that does not name its layers itself."""
    from torch import nn

    if layer == "ClassProb":
        found: torch.Tensor = network(x).float().softmax(1)
        return found
    modules = dict(network.named_modules())
    if layer == "avg_pool":
        pools = [name for name, module in modules.items() if isinstance(module, nn.AdaptiveAvgPool2d)]
        if not pools:
            raise CellsError("the network pools without a layer of its own: name a convolutional layer instead")
        layer = pools[-1]
    kept: list[torch.Tensor] = []
    mine = threading.get_ident()

    def keep(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if threading.get_ident() == mine:  # other threads run the same network at the same time
            kept.append(output)

    handle = modules[layer].register_forward_hook(keep)
    try:
        network(x)
    finally:
        handle.remove()
    return kept[0]


def to_numpy(tensor: torch.Tensor) -> Any:
    """A float32 array on the CPU."""
    return np.asarray(tensor.detach().float().cpu().numpy(), np.float32)
