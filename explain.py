"""Why an answer: where on a picture the network looked, as a heat map (Grad-CAM).

It travels in every .mar beside modelspec.py, and runs on Python 3.9 with torch 2.4 as well.

Source: Selvaraju et al. 2017, Grad-CAM (arXiv 1610.02391): the gradient of a class by the last convolution's channels,
averaged over places, weighs those channels; what is left above zero is where that class was seen.
"""

from __future__ import annotations

import io
from typing import Any, List, Optional, Tuple

import torch
from PIL import Image

from modelspec import ModelSpec

# viridis, which is also read by eyes that do not tell red from green
_STOPS = (0.0, 0.25, 0.5, 0.75, 1.0)
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def heat_map(
    network: torch.nn.Module, spec: ModelSpec, pixels_HWC: torch.Tensor, label: Optional[int] = None
) -> Tuple[torch.Tensor, int]:
    """Where the network saw a class.

    Args:
        network: eager, in eval mode, on any device; its parameters are left without gradients.
        spec: of the network.
        pixels_HWC: uint8, shape (height, width, 3), as `spec.preprocess.pixels` makes them.
        label: index of the class, or of the output; the likeliest when None.

    Returns:
        (float32 of shape (height, width) on the CPU in 0..1, 1 where it was seen most; the index that it is for).

    Raises:
        ValueError: the network has no convolution over a picture.
    """
    device = next(network.parameters()).device
    held: List[torch.Tensor] = []

    def hold(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if min(output.shape[2:]) > 1:  # squeeze-and-excitation convolves single pixels
            held[:] = [output]
        return output.clone()  # what follows may work in place

    handles = [m.register_forward_hook(hold) for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            images_NCHW = spec.preprocess.normalize(pixels_HWC.clone().unsqueeze(0).to(device)).requires_grad_()
            outputs_K = network(images_NCHW)[0].float()
            if not held:
                raise ValueError("the network has no convolution over a picture: there is nothing to look into")
            index = int(outputs_K.argmax()) if label is None else label
            (gradient,) = torch.autograd.grad(outputs_K[index], held[0])
        activation = held[0].detach()
    finally:
        for handle in handles:
            handle.remove()
    weights = gradient.mean((2, 3), keepdim=True)
    seen_HW = (weights * activation).sum(1, keepdim=True).relu().float()
    height, width = spec.preprocess.size_px
    seen_HW = torch.nn.functional.interpolate(seen_HW, (height, width), mode="bilinear", align_corners=False)[0, 0]
    return (seen_HW / seen_HW.max().clamp_min(1e-12)).cpu(), index


def overlay(pixels_HWC: torch.Tensor, heat_HW: torch.Tensor, share: float = 0.55) -> Image.Image:
    """The picture as the network got it, with its heat map laid over it, stronger where it is hotter."""
    picture = pixels_HWC.to(torch.float32)
    alpha = (share * heat_HW).unsqueeze(2)
    mixed = picture * (1 - alpha) + _coloured(heat_HW) * alpha
    data = mixed.round().clamp(0, 255).to(torch.uint8).contiguous()
    return Image.frombytes("RGB", (data.shape[1], data.shape[0]), bytes(data.flatten().tolist()))


def overlay_png(pixels_HWC: torch.Tensor, heat_HW: torch.Tensor) -> bytes:
    """`overlay` as the bytes of a PNG."""
    buffer = io.BytesIO()
    overlay(pixels_HWC, heat_HW).save(buffer, "PNG")
    return buffer.getvalue()


def _coloured(heat_HW: torch.Tensor) -> torch.Tensor:
    """Colours of a heat map, float32 of shape (height, width, 3) in 0..255."""
    coloured = torch.zeros((*heat_HW.shape, 3))
    for low, high, first, second in zip(_STOPS, _STOPS[1:], _COLOURS, _COLOURS[1:]):
        inside = (heat_HW >= low) & (heat_HW <= high)
        part = ((heat_HW[inside] - low) / (high - low)).unsqueeze(1)
        coloured[inside] = torch.tensor(first) * (1.0 - part) + torch.tensor(second) * part
    return coloured
