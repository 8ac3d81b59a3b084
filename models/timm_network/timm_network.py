"""Any network of timm by its own name with timm_ before it, as timm_resnet18d: its layers and state dict keys are kept.

timm is no requirement: where such a network trains or is served, `pip install -r requirements-timm.txt`.
"""

from __future__ import annotations

from torch import nn

VARIANTS = {}
HEAD = ""
PREPROCESS = {}
PRETRAINED = {}


class TimmNetwork(nn.Module):
    """Makes timm's network of a name; `dropout` acts before its last layer.

    Args:
        num_classes: width of the last layer.
        dropout: share of features that the last layer does not see while training.
        name: as timm.list_models() has it.
    """

    def __new__(cls, num_classes: int = 2, dropout: float = 0.0, name: str = "") -> nn.Module:  # type: ignore[misc]
        """Build it with fresh weights."""
        import timm

        network: nn.Module = timm.create_model(name, num_classes=num_classes, drop_rate=dropout)
        return network
