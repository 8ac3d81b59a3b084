"""ResNet V2 of 50, 101 or 152 layers for any number of channels, every layer under the name that Keras gives it.

Source: He et al. 2016 (arXiv 1603.05027), pre-activation, as in Keras' ResNet50V2: strides at the end of a stack.
23.6 M (50) to 58.3 M (152) parameters below the head.
"""

from __future__ import annotations

from typing import List, Tuple

import torch
from torch import nn
from torch.nn import functional as F

VARIANTS = {"resnet50_v2": {"depth": 50}, "resnet101_v2": {"depth": 101}, "resnet152_v2": {"depth": 152}}
HEAD = "ClassProb"
PREPROCESS = {"size_px": (224, 224), "resize": "crop", "crop_fraction": 0.875}
PRETRAINED = {}

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ResNetV2(nn.Module):
    """Pre-activation ResNet of a given depth; `dropout` acts before the last layer.

    Args:
        num_classes: width of the last layer.
        dropout: share of features that the last layer does not see while training.
        depth: 50, 101 or 152 layers.
        channels: of the input.
        strips: also take pictures with the channels side by side, (batch, 3, side, side x channels), grey in three
            equal colours: how a server receives a crop of many channels.
        output: layer that `forward` gives instead of the logits, averaged over space; empty for the logits.

    Attributes:
        layers: names that `features` knows, in the order in which they are computed.
    """

    def __init__(
        self,
        num_classes: int = 2,
        dropout: float = 0.0,
        depth: int = 50,
        channels: int = 3,
        strips: bool = False,
        output: str = "",
    ) -> None:
        super().__init__()
        self.channels, self.strips, self.output = channels, strips, output
        self.conv1_conv = nn.Conv2d(channels, 64, 7, 2, padding=3)
        self.plan: List[Tuple[str, int, bool]] = []
        self.layers: List[str] = ["conv1_conv", "pool1_pool"]
        count = 64
        for stack, blocks in enumerate(_BLOCKS[depth], start=2):
            filters = 64 * 2 ** (stack - 2)
            for number in range(1, blocks + 1):
                name = "conv{}_block{}".format(stack, number)
                stride = 2 if number == blocks and stack < 5 else 1
                self._block(name, count, filters, stride, number == 1)
                count = 4 * filters
        self.post_bn = _batch_norm(count)
        self.dropout = nn.Dropout(dropout)
        self.ClassProb = nn.Linear(count, num_classes)
        self.layers += ["post_bn", "post_relu", "pool5", "ClassProb"]
        self.feature_dim = count
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _block(self, name: str, inputs: int, filters: int, stride: int, widens: bool) -> None:
        self.add_module(name + "_preact_bn", _batch_norm(inputs))
        if widens:
            self.add_module(name + "_0_conv", nn.Conv2d(inputs, 4 * filters, 1, stride))
        self.add_module(name + "_1_conv", nn.Conv2d(inputs, filters, 1, bias=False))
        self.add_module(name + "_1_bn", _batch_norm(filters))
        self.add_module(name + "_2_conv", nn.Conv2d(filters, filters, 3, stride, padding=1, bias=False))
        self.add_module(name + "_2_bn", _batch_norm(filters))
        self.add_module(name + "_3_conv", nn.Conv2d(filters, 4 * filters, 1))
        self.plan.append((name, stride, widens))
        self.layers += [name + "_preact_relu", name + "_1_relu", name + "_2_relu", name + "_out"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes), or features of `output`, for images of (batch, channels, height, width)."""
        if self.strips:
            x = _unfolded(x, self.channels)
        if self.output:
            found = self.features(x, self.output)
            return found.mean((2, 3)) if found.ndim == 4 else found
        return self._logits(x)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.ClassProb(self.dropout(self._run(x, "pool5")))

    def features(self, x: torch.Tensor, layer: str = "pool5") -> torch.Tensor:
        """Output of a named layer; nothing after it is computed.

        Args:
            x: images of shape (batch, channels, height, width).
            layer: one of `layers`. "pool5" is the profile, "ClassProb" gives class probabilities.

        Returns:
            (batch, features), or (batch, features, height, width) for a convolutional layer.
        """
        if layer not in self.layers:
            raise KeyError("no layer {!r} in ResNetV2; for instance {}".format(layer, ", ".join(self.layers[-6:])))
        if layer == "ClassProb":
            return self._logits(x).float().softmax(1)
        return self._run(x, layer)

    def _run(self, x: torch.Tensor, until: str) -> torch.Tensor:
        x = self.conv1_conv(x)
        if until == "conv1_conv":
            return x
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
        if until == "pool1_pool":
            return x
        for name, stride, widens in self.plan:
            active = F.relu(getattr(self, name + "_preact_bn")(x))
            if until == name + "_preact_relu":
                return active
            if widens:
                shortcut = getattr(self, name + "_0_conv")(active)
            else:
                shortcut = F.max_pool2d(x, 1, stride) if stride > 1 else x
            inner = F.relu(getattr(self, name + "_1_bn")(getattr(self, name + "_1_conv")(active)))
            if until == name + "_1_relu":
                return inner
            inner = F.relu(getattr(self, name + "_2_bn")(getattr(self, name + "_2_conv")(inner)))
            if until == name + "_2_relu":
                return inner
            x = shortcut + getattr(self, name + "_3_conv")(inner)
            if until == name + "_out":
                return x
        x = self.post_bn(x)
        if until == "post_bn":
            return x
        x = F.relu(x)
        return x if until == "post_relu" else x.mean((2, 3))


def _batch_norm(features: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(features, eps=1.001e-5, momentum=0.01)


def _unfolded(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Fold strips, channels side by side and grey in three colours, into (batch, channels, side, side)."""
    count, colours, side, length = x.shape
    if colours != 3 or length != channels * side:
        return x
    return x[:, 0].reshape(count, side, channels, side).permute(0, 2, 1, 3)
