"""ResNet: torchvision's residual networks with a head of any size. Input 3x224x224 or larger.

Source: He et al. 2015 (arXiv 1512.03385). 11.2 M (resnet18) to 42.5 M (resnet101) parameters below the head.
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import resnet

VARIANTS = {
    "resnet18": {"depth": 18},
    "resnet34": {"depth": 34},
    "resnet50": {"depth": 50},
    "resnet101": {"depth": 101},
}
HEAD = "fc"
PREPROCESS = {"size_px": (224, 224), "resize": "crop", "crop_fraction": 0.875}
PRETRAINED = {
    "resnet18": {"torchvision": "ResNet18_Weights.IMAGENET1K_V1"},
    "resnet34": {"torchvision": "ResNet34_Weights.IMAGENET1K_V1"},
    "resnet50": {"torchvision": "ResNet50_Weights.IMAGENET1K_V2"},
    "resnet101": {"torchvision": "ResNet101_Weights.IMAGENET1K_V2"},
}
_BLOCKS = {
    18: (resnet.BasicBlock, [2, 2, 2, 2]),
    34: (resnet.BasicBlock, [3, 4, 6, 3]),
    50: (resnet.Bottleneck, [3, 4, 6, 3]),
    101: (resnet.Bottleneck, [3, 4, 23, 3]),
}


class ResNet(resnet.ResNet):
    """torchvision's ResNet of a given depth, its state dict keys kept; `dropout` acts before the last layer."""

    def __init__(self, num_classes: int = 2, dropout: float = 0.0, depth: int = 18) -> None:
        block, layers = _BLOCKS[depth]
        super().__init__(block, layers, num_classes=num_classes)
        self.head_dropout = nn.Dropout(dropout)

    def _forward_impl(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.head_dropout(torch.flatten(self.avgpool(x), 1)))
