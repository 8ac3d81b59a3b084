"""CatAndDogConvNet: the small network of the HTCondor example. 1,210,196 parameters, input 3x224x224.

Source: the CHTC machine-learning workflow template; pictures are normalised with mean and deviation 0.5 there.
"""

from __future__ import annotations

import torch
from torch import nn

VARIANTS = {"cat_dog_conv_net": {}}
HEAD = "classifier"
PREPROCESS = {"size_px": (224, 224), "resize": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
PRETRAINED = {}


class CatAndDogConvNet(nn.Module):
    """Three convolutions, two of stride 2, each halved, then 500, 50 and `num_classes` units."""

    def __init__(self, num_classes: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, stride=2, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * 6 * 6, 500),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(500, 50),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(50, num_classes),
        )

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Map float32 (batch, 3, 224, 224) to logits (batch, num_classes)."""
        return self.classifier(self.features(images_NCHW))
