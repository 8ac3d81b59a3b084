"""Random changes of crops while training, a whole batch at once, on the device where the network runs.

Source: DeepProfiler's order and ranges: a square crop resized back, mirroring, quarter turns, brightness, contrast.
"""

from __future__ import annotations

import torch
from torch.nn import functional

SMALLEST_SIDE = 0.8
BRIGHTNESS = 0.1
CONTRAST = 0.2


def augment(crops_NCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Change every crop at random.

    Args:
        crops_NCHW: values 0..1, square.
        generator: on the CPU; its state alone decides the changes.

    Returns:
        Crops of the same shape; brightness may take values a little out of 0..1, as in DeepProfiler.
    """
    return _light(_turn(crops_NCHW, generator), generator)


def _turn(crops_NCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the crops zoomed into a random square, half mirrored, all turned by a random number of quarters."""
    count = len(crops_NCHW)
    drawn = torch.rand((count, 5), generator=generator)
    side = torch.where(drawn[:, 0] < 0.5, SMALLEST_SIDE + (1 - SMALLEST_SIDE) * drawn[:, 1], torch.ones(count))
    shift = (1 - side)[:, None] * (2 * drawn[:, 2:4] - 1)
    mirror = torch.where(drawn[:, 4] < 0.5, -1.0, 1.0)
    quarters = torch.randint(4, (count,), generator=generator)
    cos = torch.tensor([1.0, 0.0, -1.0, 0.0])[quarters]
    sin = torch.tensor([0.0, 1.0, 0.0, -1.0])[quarters]
    theta = torch.zeros((count, 2, 3))
    theta[:, 0, 0], theta[:, 0, 1] = side * cos * mirror, -side * sin
    theta[:, 1, 0], theta[:, 1, 1] = side * sin * mirror, side * cos
    theta[:, :, 2] = shift
    grid = functional.affine_grid(theta.to(crops_NCHW.device), list(crops_NCHW.shape), align_corners=False)
    return functional.grid_sample(crops_NCHW, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _light(crops_NCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each channel brighter or darker by up to 0.1, then its contrast about its mean times 0.8 to 1.2."""
    drawn = torch.rand((2, *crops_NCHW.shape[:2], 1, 1), generator=generator).to(crops_NCHW.device)
    bright = crops_NCHW + (2 * drawn[0] - 1) * BRIGHTNESS
    mean = bright.mean((2, 3), keepdim=True)
    return (bright - mean) * (1 + (2 * drawn[1] - 1) * CONTRAST) + mean
