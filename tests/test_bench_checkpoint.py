"""The bench of checkpoints trains and saves for real, and judges by the median of its rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from marten.bench.checkpointing import bench_checkpoint, checkpoint_rows, checkpoint_table, share


def test_it_trains_saves_and_leaves_nothing(drawn_set: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (one,) = bench_checkpoint(["cat_dog_conv_net"], drawn_set, 2, 0.0, tmp_path / "bench", said.append)
    assert list((tmp_path / "bench").iterdir()) == []
    assert one["steps"] == 1  # 22 pictures in a batch of 32
    # 1.2 million parameters in fp32, four times: weights, two moments, the best weights
    assert one["checkpoint_mb"] == pytest.approx(4 * 4 * 1.21, rel=0.05)
    assert [turn for turn in one["rounds"] if min(turn.values()) <= 0] == []
    assert len(said) == len(one["rounds"]) == 2
    assert checkpoint_table([one])[-1].startswith("| cat_dog_conv_net | 19 | ")


@pytest.mark.parametrize(("save_s", "reached"), [(1.9, True), (2.1, False)])
def test_the_share_is_the_median_over_the_rounds(save_s: float, reached: bool) -> None:
    rounds = [{"step_s": 2.0, "save_s": seconds} for seconds in (0.1, save_s, 50.0)]
    found = {"network": "vgg", "steps": 50, "checkpoint_mb": 1.0, "rounds": rounds}
    assert share(found) == pytest.approx(save_s / 100)
    assert [row.reached for row in checkpoint_rows([found])] == [reached]
