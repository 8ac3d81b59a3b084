"""Networks that others keep, by their names: every classifier of torchvision, and of timm where that is installed.

They have no file of facts: ImageNet weights and preprocessing are what the registry says, and the head is what changes
with the number of classes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torchvision

from marten.architectures import Architecture, architecture_file, build_network
from marten.errors import UsageError
from modelspec import Preprocess

_TIMM = "timm_"


@functools.cache  # it builds the network twice, and a run asks several times
def find_foreign(name: str) -> Architecture | None:
    """The network that torchvision, or timm with `timm_` before it, knows by that name; None where neither does.

    Raises:
        UsageError: a network of timm, and timm is not installed or knows no such network.
    """
    if name in torchvision.models.list_models(module=torchvision.models):
        return _described("torchvision_network", name, name, *_told_by_torchvision(name))
    if name.startswith(_TIMM):
        theirs = name.removeprefix(_TIMM)
        return _described("timm_network", name, theirs, *_told_by_timm(theirs))
    return None


def _described(
    arch: str, name: str, theirs: str, preprocess: Preprocess, pretrained: Mapping[str, str]
) -> Architecture:
    arch_args = {"name": theirs}
    head = _head(lambda classes: build_network(arch, {**arch_args, "num_classes": classes}))
    return Architecture(name, arch, architecture_file(arch), arch_args, head, preprocess, pretrained)


def _head(build: Callable[[int], torch.nn.Module]) -> str:
    """Prefix of the parameters whose shape follows the number of classes."""
    try:
        with torch.device("meta"):  # where nothing is computed
            two, three = (build(classes).state_dict() for classes in (2, 3))
    except NotImplementedError:  # regnet computes its widths with tensors
        with torch.random.fork_rng(devices=[]):
            two, three = (build(classes).state_dict() for classes in (2, 3))
    names = [name for name in two if two[name].shape != three[name].shape]
    return os.path.commonprefix(names)  # noqa: RUF071 - of letters: head_dist. stands beside head.


def _told_by_torchvision(name: str) -> tuple[Preprocess, Mapping[str, str]]:
    weights = list(torchvision.models.get_model_weights(name))
    if not weights:
        return Preprocess(resize="crop", crop_fraction=0.875), {}
    best = torchvision.models.get_model_weights(name).DEFAULT
    preset: Any = best.transforms()
    (crop,), (resize,) = preset.crop_size, preset.resize_size
    made = Preprocess(
        size_px=(crop, crop),
        resize="crop",
        crop_fraction=min(1.0, crop / resize),
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    return made, {"torchvision": str(best)}


def _told_by_timm(name: str) -> tuple[Preprocess, Mapping[str, str]]:
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"{_TIMM}{name} takes the package timm: pip install -r requirements-timm.txt")
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:5]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UsageError(f"timm {timm.__version__} knows no network called {name!r}{hint}")
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return Preprocess(resize="crop", crop_fraction=0.875), {}
    _, height, width = config.input_size
    made = Preprocess(
        size_px=(height, width),
        resize="squash" if config.crop_mode == "squash" else "crop",
        mean=tuple(config.mean),
        std=tuple(config.std),
        interpolation="bicubic" if config.interpolation == "bicubic" else "bilinear",
    )
    if made.resize == "crop":
        made = replace(made, crop_fraction=config.crop_pct)
    return made, {"timm": name} if timm.is_model_pretrained(name) else {}
