"""Any classifier of torchvision by its own name, as mobilenet_v3_large: its layers and state dict keys are kept.

The networks are torchvision.models'; marten/registries.py finds their ImageNet weights, preprocessing and head.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import get_model

VARIANTS = {}
HEAD = ""
PREPROCESS = {}
PRETRAINED = {}
_PLAIN = {"aux_logits": False, "init_weights": False, "transform_input": True}
_ARGUMENTS = {"googlenet": _PLAIN, "inception_v3": _PLAIN}
"""One answer instead of several; and these two shift ImageNet's usual mean and deviation to the ones they know."""


class TorchvisionNetwork(nn.Module):
    """Makes torchvision's network of a name; `dropout` acts in its last layers, where it has any there.

    Args:
        num_classes: width of the last layer.
        dropout: share of features that the last layers do not see while training.
        name: as torchvision.models.list_models() has it.
    """

    def __new__(cls, num_classes: int = 2, dropout: float = 0.0, name: str = "") -> nn.Module:  # type: ignore[misc]
        """Build it with fresh weights."""
        network: nn.Module = get_model(name, weights=None, num_classes=num_classes, **_ARGUMENTS.get(name, {}))
        head = list(network.state_dict())[-1].partition(".")[0]
        for path, module in network.named_modules():
            if isinstance(module, nn.Dropout) and path.partition(".")[0] == head:
                module.p = dropout
        return network
