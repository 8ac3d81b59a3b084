"""Two pictures of a batch become one, whose label is both in the same shares: mixup and cutmix.

Like all randomness of a run, the partners, the shares and the places are a function of (seed, step). Where several
processes share a batch, each mixes the pictures of its own share.
"""

from __future__ import annotations

import math
import random

import torch

from marten.streams import stream

_MIXUP_ALPHA = 0.2
"""Source: Zhang et al. 2018, mixup: Beyond Empirical Risk Minimization, ImageNet."""
_CUTMIX_ALPHA = 1.0
"""Source: Yun et al. 2019, CutMix."""


def mix(
    images_NCHW: torch.Tensor, targets_N: torch.Tensor, how: str, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mix each picture of a batch with another one of it.

    none    nothing
    mixup   share · picture + (1 - share) · partner, the share from Beta(0.2, 0.2)
    cutmix  a rectangle of the partner pasted in, its area 1 - share, the share even over 0..1
    both    one or the other, by the toss of a coin at each step

    Args:
        images_NCHW: normalised.
        targets_N: labels or scores, one (or one row) per picture.
        how: one of the above.
        seed: of the run.
        step: its number in the whole run.

    Returns:
        (pictures, targets of the partners, share of the pictures' own targets).
    """
    if how == "none":
        return images_NCHW, targets_N, 1.0
    place = stream(seed, "mix", step)
    drawn = random.Random(place)
    partners_N = torch.randperm(len(images_NCHW), generator=torch.Generator().manual_seed(place))
    partners_N = partners_N.to(images_NCHW.device)
    if how == "both":
        how = drawn.choice(("mixup", "cutmix"))
    if how == "mixup":
        share = drawn.betavariate(_MIXUP_ALPHA, _MIXUP_ALPHA)
        return images_NCHW * share + images_NCHW[partners_N] * (1 - share), targets_N[partners_N], share
    height, width = images_NCHW.shape[2:]
    side = math.sqrt(1 - drawn.betavariate(_CUTMIX_ALPHA, _CUTMIX_ALPHA))
    top, bottom = _span(drawn.randrange(height), side * height, height)
    left, right = _span(drawn.randrange(width), side * width, width)
    mixed_NCHW = images_NCHW.clone()
    mixed_NCHW[:, :, top:bottom, left:right] = images_NCHW[partners_N, :, top:bottom, left:right]
    # the rectangle may reach beyond the picture: what counts is what was pasted
    return mixed_NCHW, targets_N[partners_N], 1 - (bottom - top) * (right - left) / (height * width)


def _span(centre: int, length: float, size: int) -> tuple[int, int]:
    return max(0, round(centre - length / 2)), min(size, round(centre + length / 2))
