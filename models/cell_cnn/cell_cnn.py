"""A small network for crops of single cells: some blocks of convolution and pooling, one layer of features.

Block i has 8 x 2^i filters; the mean over space goes through a dense layer "features". 0.03 M parameters with three
blocks, 64 features and five channels: trains on a laptop's processor.
"""

from __future__ import annotations

from typing import List

import torch
from torch import nn
from torch.nn import functional as F

VARIANTS = {"cell_cnn": {"blocks": 4}}
HEAD = "ClassProb"
PREPROCESS = {"size_px": (128, 128)}
PRETRAINED = {}


class CellCNN(nn.Module):
    """Blocks of convolution, batch norm, ReLU and pooling, then features and classes.

    Args:
        num_classes: width of the last layer.
        dropout: share of features that the last layer does not see while training.
        blocks: of convolution and pooling.
        feature_dim: width of the layer "features".
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
        blocks: int = 4,
        feature_dim: int = 256,
        channels: int = 3,
        strips: bool = False,
        output: str = "",
    ) -> None:
        super().__init__()
        self.channels, self.strips, self.output = channels, strips, output
        self.blocks = nn.ModuleList()
        count = channels
        for number in range(blocks):
            wide = 8 * 2**number
            conv = nn.Conv2d(count, wide, 3, padding=1, bias=False)
            self.blocks.append(nn.Sequential(conv, nn.BatchNorm2d(wide), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)))
            count = wide
        self.dense = nn.Linear(count, feature_dim)
        self.dropout = nn.Dropout(dropout)
        self.ClassProb = nn.Linear(feature_dim, num_classes)
        self.layers: List[str] = ["block{}".format(i + 1) for i in range(blocks)] + ["pool5", "features", "ClassProb"]
        self.feature_dim = feature_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes), or features of `output`, for images of (batch, channels, height, width)."""
        if self.strips:
            x = _unfolded(x, self.channels)
        if self.output:
            found = self.features(x, self.output)
            return found.mean((2, 3)) if found.ndim == 4 else found
        return self._logits(x)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.ClassProb(self.dropout(self.features(x, "features")))

    def features(self, x: torch.Tensor, layer: str = "features") -> torch.Tensor:
        """Output of a named layer; nothing after it is computed.

        Args:
            x: images of shape (batch, channels, height, width).
            layer: one of `layers`. "features" is the profile, "ClassProb" gives class probabilities.

        Returns:
            (batch, features), or (batch, features, height, width) for a block.
        """
        if layer not in self.layers:
            raise KeyError("no layer {!r} in CellCNN; there are {}".format(layer, ", ".join(self.layers)))
        if layer == "ClassProb":
            return self._logits(x).float().softmax(1)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if layer == "block{}".format(number):
                return x
        x = x.mean((2, 3))
        return x if layer == "pool5" else F.relu(self.dense(x))


def _unfolded(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Fold strips, channels side by side and grey in three colours, into (batch, channels, side, side)."""
    count, colours, side, length = x.shape
    if colours != 3 or length != channels * side:
        return x
    return x[:, 0].reshape(count, side, channels, side).permute(0, 2, 1, 3)
