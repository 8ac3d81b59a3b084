"""BaseCNN: four convolutions and two dense layers, trained from scratch. 8,925,998 parameters, input 3x224x224.

Source: the dogs-vs-cats network of the owner's first classifier; 87 % validation accuracy after 10 epochs on
22,500 pictures by its original recipe (constant learning rate 1e-3, no augmentation).
"""

from __future__ import annotations

import torch
from torch import nn

VARIANTS = {"base_cnn": {}}
HEAD = "classifier"
PREPROCESS = {"size_px": (224, 224), "resize": "squash"}
PRETRAINED = {}


class BaseCNN(nn.Module):
    """Unpadded 3x3 convolutions of 64, 128, 256 and 512 channels, each halved, then 100 and `num_classes` units."""

    def __init__(self, num_classes: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for in_channels, out_channels in ((3, 64), (64, 128), (128, 256), (256, 512)):
            # The owner's order is ReLU, dropout, pooling. ReLU commutes with both, and costs a quarter behind them.
            blocks += [
                nn.Conv2d(in_channels, out_channels, 3),
                nn.BatchNorm2d(out_channels),
                nn.Dropout(dropout),
                nn.MaxPool2d(2),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(512 * 12 * 12, 100),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(100, num_classes),
        )

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Map float32 (batch, 3, 224, 224) to logits (batch, num_classes)."""
        return self.classifier(self.features(images_NCHW))
