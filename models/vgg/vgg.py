"""PretrainedVGG19: torchvision's vgg19_bn under a small classifier. 46,354,758 parameters, input 3x224x224.

The constructor never downloads: ImageNet weights are an act of training (`train_main.py --weights`), so a server
can build this network without a network.

Source: Simonyan and Zisserman 2014 (arXiv 1409.1556); the 1028-512 classifier is the owner's.
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import vgg19_bn

VARIANTS = {"vgg": {}}
HEAD = "classifier"
PREPROCESS = {"size_px": (224, 224), "resize": "squash"}
PRETRAINED = {"vgg": {"torchvision": "VGG19_BN_Weights.IMAGENET1K_V1"}}


class PretrainedVGG19(nn.Module):
    """The convolutions of vgg19_bn, then 1028, 512 and `num_classes` units."""

    def __init__(self, num_classes: int = 2, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = vgg19_bn(weights=None, init_weights=False).features
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(25088, 1028),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(1028, 512),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(512, num_classes),
        )

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Map float32 (batch, 3, height, width) to logits (batch, num_classes)."""
        return self.classifier(self.avgpool(self.features(images_NCHW)))
