"""Layers that look at a whole batch although a process may hold a part of it: batch norm, and dropout on processors.

With them several processes compute what one would have computed, but for the rounding of sums.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from marten.distributed import World


class _Sum(torch.autograd.Function):
    """Sum over the processes; what flows back to it is summed likewise."""

    @staticmethod
    def forward(ctx: object, values: torch.Tensor) -> torch.Tensor:
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(ctx, gradients[0])


def _sum(values: torch.Tensor) -> torch.Tensor:
    summed: torch.Tensor = _Sum.apply(values)
    return summed


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the pictures of all processes, on processors; torch.nn.SyncBatchNorm does the same on GPUs."""

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Normalise; while training by the mean and variance of the whole batch, which also move the running ones."""
        if not self.training:
            return super().forward(images_NCHW)
        values_NCHW = images_NCHW.float()
        channels = values_NCHW.shape[1]
        count = values_NCHW.new_tensor([values_NCHW.numel() / channels])
        sums = _sum(torch.cat([values_NCHW.sum((0, 2, 3)), count]))
        mean, whole = sums[:-1] / sums[-1], sums[-1].detach()
        centred_NCHW = values_NCHW - mean[:, None, None]
        # from the mean, not from the sum of squares: their difference would lose the digits that matter
        variance = _sum(centred_NCHW.square().sum((0, 2, 3))) / whole
        self._move(mean.detach(), variance.detach() * whole / (whole - 1).clamp(min=1))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        normal_NCHW: torch.Tensor = centred_NCHW * scale[:, None, None] + self.bias[:, None, None]
        return normal_NCHW.to(images_NCHW.dtype)

    @torch.no_grad()
    def _move(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum or 0.0)
        self.running_var.lerp_(variance, self.momentum or 0.0)


class SharedDropout(nn.Dropout):
    """Dropout on processors: masks for the whole batch, of which each process takes the rows of its pictures.

    torch draws one random number for each feature, which took 40 % of base_cnn's training; here 64 random bits serve
    four features, whose chance to be left out is `p` to the nearest 1/65,536.
    """

    world: World
    whole: int | None = None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Leave features out; `whole` says how many pictures the batch has, where these are not all."""
        if not self.training or not 0 < self.p < 1:
            return super().forward(features)
        length = len(features) if self.whole is None else self.whole
        left_out = min(round(self.p * 2**16), 2**16 - 1)  # never all of them
        like_memory = features.ndim == 4 and features.stride(1) == 1  # channels last
        n, *rest = features.shape
        shape = (length, *rest[1:], rest[0]) if like_memory else (length, *rest)
        count = math.prod(shape)
        words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        kept = (words.view(torch.int16)[:count] >= left_out - 2**15).view(shape)
        if length != n:
            kept = kept[self.world.rank :: self.world.size]
        mask = kept.view(torch.uint8).to(features.dtype).mul_(1 / (1 - left_out / 2**16))
        return features * (mask.permute(0, 3, 1, 2) if like_memory else mask)


def share_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    """Let every batch norm of a network look at the pictures of all processes; its state dict stays as it is."""
    if device.type == "cuda":
        synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return synced
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm
    return network


def share_dropout(network: nn.Module, world: World) -> list[SharedDropout]:
    """Let every dropout of a network draw for the whole batch; gives them, to be told how large that is."""
    found = []
    for module in network.modules():
        if type(module) is nn.Dropout:
            module.__class__ = SharedDropout
            dropout: SharedDropout = module  # type: ignore[assignment]
            dropout.world = world
            found.append(dropout)
    return found
