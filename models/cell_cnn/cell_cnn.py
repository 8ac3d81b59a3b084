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

    Attributes:
        layers: names that `features` knows, in the order in which they are computed.
    """

    def __init__(
        self, num_classes: int = 2, dropout: float = 0.0, blocks: int = 4, feature_dim: int = 256, channels: int = 3
    ) -> None:
        super().__init__()
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
        """Logits of shape (batch, classes) for images of shape (batch, channels, height, width)."""
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
            return self.forward(x).float().softmax(1)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if layer == "block{}".format(number):
                return x
        x = x.mean((2, 3))
        return x if layer == "pool5" else F.relu(self.dense(x))
