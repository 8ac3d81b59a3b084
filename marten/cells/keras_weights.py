"""Weights of DeepProfiler's Keras checkpoints (.hdf5), brought into a network whose layers bear the same names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from marten.cells.errors import CellsError

if TYPE_CHECKING:
    import torch

_NAMES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def read_keras(path: Path) -> dict[str, dict[str, Any]]:
    """Read a Keras weights file without TensorFlow.

    Returns:
        Arrays by layer name, then by the name of the weight, as Keras lays them out.

    Raises:
        CellsError: no such file, or not one of Keras weights.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            group = file.get("model_weights", file)
            layers: dict[str, dict[str, Any]] = {}

            def visit(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset):
                    layer, weight = name.split("/")[-2:] if "/" in name else ("", name)
                    layers.setdefault(layer, {})[weight.partition(":")[0]] = np.asarray(item)

            group.visititems(visit)
    except (OSError, ValueError) as error:
        raise CellsError(f"{path} cannot be read as a Keras checkpoint: {error}") from error
    if not layers:
        raise CellsError(f"{path} holds no layer of a Keras network")
    return layers


def keras_state(path: Path, network: torch.nn.Module, head: str = "ClassProb") -> dict[str, torch.Tensor]:
    """Turn a Keras checkpoint into the state dict of `network`.

    Args:
        path: the .hdf5 file.
        network: whose modules bear the names of the Keras layers.
        head: the class layer; in the file it may bear another name (older files name it after the target column).

    Raises:
        CellsError: a layer of the network is not in the file, or has another shape there.
    """
    import torch

    layers = read_keras(path)
    _rename_head(layers, network, head)
    state: dict[str, torch.Tensor] = {}
    for key, wanted in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros_like(wanted)
            continue
        layer, _, weight = key.rpartition(".")
        arrays = {_NAMES[name]: _as_torch(name, array) for name, array in layers.get(layer, {}).items()}
        if weight not in arrays:
            raise CellsError(f"{path} lacks {key}; it has the layers {', '.join(sorted(layers)[:8])}, …")
        if arrays[weight].shape != wanted.shape:
            raise CellsError(
                f"{path}: {key} has the shape {tuple(arrays[weight].shape)}, this network {tuple(wanted.shape)}: "
                "the channels, the classes or conv_blocks of the configuration are not those it was trained with"
            )
        state[key] = arrays[weight]
    return state


def keras_classes(path: Path, network: torch.nn.Module, head: str = "ClassProb") -> int:
    """How many classes the checkpoint tells apart."""
    layers = read_keras(path)
    _rename_head(layers, network, head)
    if head not in layers:
        raise CellsError(f"{path} has no class layer {head!r}")
    return int(layers[head]["bias"].shape[0])


def _rename_head(layers: dict[str, dict[str, Any]], network: torch.nn.Module, head: str) -> None:
    if head in layers:
        return
    named = {name for name, _ in network.named_modules()}
    others = [
        name for name, arrays in layers.items() if name not in named and arrays.get("kernel", np.ones(1)).ndim == 2
    ]
    if len(others) == 1:
        layers[head] = layers.pop(others[0])


def _as_torch(name: str, array: Any) -> torch.Tensor:
    import torch

    if name == "kernel" and array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif name == "depthwise_kernel":
        array = array.transpose(2, 3, 0, 1)
    elif name == "kernel" and array.ndim == 2:
        array = array.T
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
