"""EfficientNet B0 to B7 for any number of channels, every layer under the name that Keras gives it.

Source: Tan and Le 2019 (arXiv 1905.11946), in the variant of TensorFlow: "same" padding, batch norm epsilon 1e-3.
4.01 M (B0) to 63.8 M (B7) parameters below the head. Layers keep the names of DeepProfiler's checkpoints
(stem_conv, block6a_dwconv, top_bn, pool5, ClassProb), so that those load name by name and `features` finds them.
"""

from __future__ import annotations

import math
from typing import List, Tuple

import torch
from torch import nn
from torch.nn import functional as F

VARIANTS = {
    "efficientnet_b0": {"size": 0},
    "efficientnet_b1": {"size": 1},
    "efficientnet_b2": {"size": 2},
    "efficientnet_b3": {"size": 3},
    "efficientnet_b4": {"size": 4},
    "efficientnet_b5": {"size": 5},
    "efficientnet_b6": {"size": 6},
    "efficientnet_b7": {"size": 7},
}
HEAD = "ClassProb"
PREPROCESS = {"size_px": (224, 224), "resize": "crop", "crop_fraction": 0.875}
PRETRAINED = {}

_SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1))
"""Width and depth of B0 to B7 relative to B0."""
_STAGES = (
    (3, 1, 1, 1, 16),
    (3, 2, 2, 6, 24),
    (5, 2, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (5, 3, 1, 6, 112),
    (5, 4, 2, 6, 192),
    (3, 1, 1, 6, 320),
)
"""Kernel, blocks, stride, expansion and channels of each stage of B0."""
_DROP_CONNECT = 0.2


class EfficientNet(nn.Module):
    """EfficientNet of a given size; `dropout` acts before the last layer, whole blocks drop with up to 0.2.

    Args:
        num_classes: width of the last layer.
        dropout: share of features that the last layer does not see while training.
        size: 0 to 7, for B0 to B7.
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
        size: int = 0,
        channels: int = 3,
        strips: bool = False,
        output: str = "",
    ) -> None:
        super().__init__()
        self.channels, self.strips, self.output = channels, strips, output
        width, depth = _SCALES[size]
        self.plan: List[Tuple[str, int, int, bool, float]] = []
        self.layers: List[str] = ["stem_conv", "stem_bn", "stem_activation"]
        count = _widened(32, width)
        self._conv("stem", channels, count, 3, 2)
        total = sum(math.ceil(stage[1] * depth) for stage in _STAGES)
        for number, (kernel, repeats, stride, expansion, wide) in enumerate(_STAGES, start=1):
            for repeat in range(math.ceil(repeats * depth)):
                name = "block{}{}".format(number, chr(ord("a") + repeat))
                out = _widened(wide, width)
                drop = _DROP_CONNECT * len(self.plan) / total
                self._block(name, count, out, kernel, stride if repeat == 0 else 1, expansion, drop)
                count = out
        self._conv("top", count, _widened(1280, width), 1, 1)
        self.dropout = nn.Dropout(dropout)
        self.ClassProb = nn.Linear(_widened(1280, width), num_classes)
        self.layers += ["top_conv", "top_bn", "top_activation", "pool5", "ClassProb"]
        self.feature_dim = _widened(1280, width)
        self._start()

    def _conv(self, name: str, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, bias=False)
        self.add_module(name + "_conv", conv)
        self.add_module(name + "_bn", _batch_norm(outputs))

    def _block(
        self, name: str, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, drop: float
    ) -> None:
        inner = inputs * expansion
        if expansion != 1:
            self._conv(name + "_expand", inputs, inner, 1, 1)
            self.layers += [name + "_expand_conv", name + "_expand_bn", name + "_expand_activation"]
        self.add_module(name + "_dwconv", nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False))
        self.add_module(name + "_bn", _batch_norm(inner))
        squeezed = max(1, int(inputs * 0.25))
        self.add_module(name + "_se_reduce", nn.Conv2d(inner, squeezed, 1))
        self.add_module(name + "_se_expand", nn.Conv2d(squeezed, inner, 1))
        self._conv(name + "_project", inner, outputs, 1, 1)
        ends = ["dwconv", "bn", "activation", "se_excite", "project_conv", "project_bn"]
        adds = stride == 1 and inputs == outputs
        self.layers += [name + "_" + end for end in ([*ends, "add"] if adds else ends)]
        self.plan.append((name, kernel, expansion, adds, drop))

    def _start(self) -> None:
        """Draw first weights as the Keras implementation does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / (fan_out / module.groups)))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.ClassProb.weight)
        nn.init.zeros_(self.ClassProb.bias)

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
            raise KeyError("no layer {!r} in EfficientNet; for instance {}".format(layer, ", ".join(self.layers[-8:])))
        if layer == "ClassProb":
            return self._logits(x).float().softmax(1)
        return self._run(x, layer)

    def _run(self, x: torch.Tensor, until: str) -> torch.Tensor:
        x, done = self._conv_bn(x, "stem", until)
        if done:
            return x
        for name, _, expansion, adds, drop in self.plan:
            entered = x
            if expansion != 1:
                x, done = self._conv_bn(x, name + "_expand", until)
                if done:
                    return x
            x = _same(x, getattr(self, name + "_dwconv"))
            if until == name + "_dwconv":
                return x
            x = getattr(self, name + "_bn")(x)
            if until == name + "_bn":
                return x
            x = F.silu(x)
            if until == name + "_activation":
                return x
            gate = x.mean((2, 3), keepdim=True)
            gate = getattr(self, name + "_se_expand")(F.silu(getattr(self, name + "_se_reduce")(gate)))
            x = x * gate.sigmoid()
            if until == name + "_se_excite":
                return x
            x = getattr(self, name + "_project_conv")(x)
            if until == name + "_project_conv":
                return x
            x = getattr(self, name + "_project_bn")(x)
            if until == name + "_project_bn":
                return x
            if adds:
                x = _dropped(x, drop, self.training) + entered
                if until == name + "_add":
                    return x
        x, done = self._conv_bn(x, "top", until)
        return x if done else x.mean((2, 3))

    def _conv_bn(self, x: torch.Tensor, name: str, until: str) -> Tuple[torch.Tensor, bool]:
        x = _same(x, getattr(self, name + "_conv"))
        if until == name + "_conv":
            return x, True
        x = getattr(self, name + "_bn")(x)
        if until == name + "_bn":
            return x, True
        x = F.silu(x)
        return x, until == name + "_activation"


def _batch_norm(features: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(features, eps=1e-3, momentum=0.01)


def _widened(channels: int, width: float) -> int:
    """Scale a number of channels and round it to a multiple of 8, never down by more than a tenth."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def _same(x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    """Convolve with TensorFlow's "same" padding: an odd pixel goes to the right and the bottom."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    pads: List[int] = []
    for side in (x.shape[-1], x.shape[-2]):
        whole = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
        pads += [whole // 2, whole - whole // 2]
    if pads[0] == pads[1] == pads[2] == pads[3]:
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, pads[0], conv.dilation, conv.groups)
    return conv(F.pad(x, pads))


def _dropped(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Drop a block's whole contribution for some pictures, while training."""
    if not training or rate == 0:
        return x
    keep = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device).bernoulli_(1 - rate)
    return x * keep / (1 - rate)


def _unfolded(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Fold strips, channels side by side and grey in three colours, into (batch, channels, side, side)."""
    count, colours, side, length = x.shape
    if colours != 3 or length != channels * side:
        return x
    return x[:, 0].reshape(count, side, channels, side).permute(0, 2, 1, 3)
