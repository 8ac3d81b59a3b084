"""Dropout on processors: fair masks, drawn quickly, the same for a seed, in the memory order of what they mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from marten.distributed import ALONE, World
from marten.sharedlayers import SharedDropout, share_dropout


def layer(p: float, world: World = ALONE) -> SharedDropout:
    (dropout,) = share_dropout(nn.Sequential(nn.Dropout(p)), world)
    return dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_features_are_left_out_as_often_as_asked_and_the_mean_stays(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    out = layer(p)(torch.ones(50, 20_000, dtype=dtype)).float()
    kept = out != 0
    error = (p * (1 - p) / out.numel()) ** 0.5
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * error)
    assert kept.float().mean(1).std().item() == pytest.approx((p * (1 - p) / 20_000) ** 0.5, rel=0.5)  # nor in stripes
    assert kept.float().mean(0).std().item() == pytest.approx((p * (1 - p) / 50) ** 0.5, rel=0.05)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=5e-3, atol=0)


def test_neighbours_are_left_out_independently() -> None:
    torch.manual_seed(2)
    kept = (layer(0.5)(torch.ones(1_000_003)) != 0).float() * 2 - 1
    for distance in (1, 2, 3, 4, 64):
        assert abs((kept[distance:] * kept[:-distance]).mean().item()) < 5e-3


def test_gradients_pass_where_features_did_and_a_seed_draws_the_same_again() -> None:
    features = torch.randn(6, 5, 7, 9).to(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(3)
    out = layer(0.3)(features)
    out.sum().backward()
    assert features.grad is not None
    torch.testing.assert_close(features.grad * features, out)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(3)
    assert torch.equal(layer(0.3)(features), out)
    assert not torch.equal(layer(0.3)(features), out)


def test_each_process_takes_its_rows_of_one_mask() -> None:
    images = torch.ones(7, 4, 5, 3).to(memory_format=torch.channels_last)
    torch.manual_seed(4)
    whole = layer(0.4)(images)
    for rank in range(3):
        world = World(rank, 3)
        dropout = layer(0.4, world)
        dropout.whole = 7
        torch.manual_seed(4)
        assert torch.equal(dropout(world.share(images)), world.share(whole))  # type: ignore[type-var, arg-type]


@pytest.mark.parametrize(("p", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_all_or_nothing_and_evaluation_are_torchs_own(p: float, expected: float) -> None:
    assert layer(p)(torch.ones(3, 4)).eq(expected).all()
    assert layer(0.5).eval()(torch.ones(3, 4)).eq(1).all()


def test_nearly_all_left_out_is_not_all() -> None:
    torch.manual_seed(5)
    assert layer(1 - 1e-7)(torch.ones(2**20)).isfinite().all()
