"""How a network of cells is trained: learning rate by epoch, optimizer, first weights. DeepProfiler's recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from marten.cells.config import Config
from marten.cells.errors import CellsError, ConfigError
from marten.errors import TrainingError

WARM_UP = 5
L2 = 1e-5
MOMENTUM = 0.9
PLATEAU = {"factor": 0.1, "patience": 5, "least": 1e-4}


def learning_rate(config: Config, epoch: int, losses: Sequence[float]) -> float:
    """The learning rate of an epoch, in closed form, so that a resumed run goes on with its curve.

    absent            constant
    "cosine"          epochs 0 to 4: lr/5, lr/4, lr/3, lr/2, lr; then half a cosine over all epochs
    "plateau"         a tenth after 5 epochs without a smaller validation loss, down to 1e-4
    {"epoch", "lr"}   from each epoch on the rate beside it

    Args:
        config: names the schedule.
        epoch: counted from 0.
        losses: validation losses of the epochs before.

    Raises:
        ConfigError: an unknown schedule.
    """
    base = float(config["train.model.params.learning_rate"])
    epochs = int(config["train.model.epochs"])
    schedule = config["train.model.lr_schedule"]
    if schedule is None:
        return base
    if schedule == "cosine":
        warm = min(WARM_UP, epochs)
        return base / (warm - epoch) if epoch < warm else 0.5 * (1 + math.cos(math.pi * epoch / epochs)) * base
    if schedule == "plateau":
        return _on_plateau(base, losses)
    if isinstance(schedule, Mapping) and len(schedule.get("epoch", ())) == len(schedule.get("lr", ())) > 0:
        steps = sorted(zip(schedule["epoch"], schedule["lr"], strict=True))
        return float(next((lr for start, lr in reversed(steps) if epoch >= start), base))
    raise ConfigError(
        f'{config.source}: train.model.lr_schedule must be "cosine", "plateau" or {{"epoch": [...], "lr": [...]}} of '
        f"equal length, found {schedule!r}"
    )


def _on_plateau(base: float, losses: Sequence[float]) -> float:
    rate, best, waited = base, math.inf, 0
    for loss in losses:
        if loss < best - 1e-4:
            best, waited = loss, 0
        else:
            waited += 1
        if waited >= PLATEAU["patience"]:
            rate, waited = max(rate * PLATEAU["factor"], min(PLATEAU["least"], base)), 0
    return rate


def make_optimizer(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum and L2 on kernels for EfficientNet and ResNet, Adam for the cnn."""
    rate = float(config["train.model.params.learning_rate"])
    if config["train.model.name"] == "cnn":
        return torch.optim.Adam(network.parameters(), lr=rate, eps=1e-7)
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    # Keras adds L2 x the sum of squares to the loss: its gradient is twice that
    groups = [{"params": kernels, "weight_decay": 2 * L2}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)


def first_weights(config: Config, network: nn.Module) -> str:
    """Give a fresh network ImageNet's weights where the configuration asks for them.

    Returns:
        Where they came from, for the card.

    Raises:
        CellsError: they do not exist for this network, or cannot be fetched.
    """
    if config["train.model.initialization"] == "Random":
        return "random"
    name = config["train.model.name"]
    if name != "efficientnet":
        raise CellsError(
            f"there are no ImageNet weights for {name}: set train.model.initialization to Random, or model.name to "
            "efficientnet"
        )
    size = config["train.model.params.conv_blocks"]
    weights = f"EfficientNet_B{size}_Weights.IMAGENET1K_V1"
    from torchvision.models import get_weight

    try:
        state = get_weight(weights).get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"ImageNet weights ({weights}) cannot be fetched: {getattr(error, 'reason', error)}. Fetch them once where "
            "there is a network (they stay in ~/.cache/torch), or set train.model.initialization to Random"
        ) from error
    network.load_state_dict(imagenet_state(state, network))
    return f"torchvision {weights}, first layer cycled over {len(config.channels)} channels"


def imagenet_state(weights: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """Bring torchvision's EfficientNet weights into ours; the class layer keeps its own.

    The filters of the first layer are cycled: channel i takes those of red, green or blue, i modulo 3.
    """
    own = network.state_dict()
    state = dict(own)
    for key, values in weights.items():
        mapped = _our_name(key)
        if mapped is None:
            continue
        if mapped == "stem_conv.weight":
            channels = own[mapped].shape[1]
            values = values[:, [channel % 3 for channel in range(channels)]]
        if own[mapped].shape != values.shape:
            raise CellsError(f"{key} has the shape {tuple(values.shape)}, {mapped} {tuple(own[mapped].shape)}")
        state[mapped] = values
    return state


def _our_name(key: str) -> str | None:
    """Our name of a weight of torchvision: features.2.0.block.1.0.weight is block2a_dwconv.weight."""
    parts = key.split(".")
    if parts[0] != "features":
        return None
    ends = {"0": "conv", "1": "bn"}
    if len(parts) == 4:
        return f"{'stem' if parts[1] == '0' else 'top'}_{ends[parts[2]]}.{parts[3]}"
    name = f"block{parts[1]}{chr(ord('a') + int(parts[2]))}"
    place, last = int(parts[4]), parts[-1]
    # the first stage does not expand: its layers stand one place earlier
    role = (("dw", "se", "project") if parts[1] == "1" else ("expand", "dw", "se", "project"))[place]
    if role == "se":
        return f"{name}_se_{'reduce' if parts[5] == 'fc1' else 'expand'}.{last}"
    if role == "dw":
        return f"{name}_{'dwconv' if parts[5] == '0' else 'bn'}.{last}"
    return f"{name}_{role}_{ends[parts[5]]}.{last}"
