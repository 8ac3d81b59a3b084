"""Recipes are compared on equal terms, and a finished run is not trained again."""

from __future__ import annotations

from pathlib import Path

import pytest

from marten.errors import TrainingError
from marten.files import MODELS
from marten.recipes import Outcome, recipe_table, run_recipe
from tests.pictures import draw, encode

QUICK = ("--device", "cpu", "--precision", "fp32", "--num_workers", "0", "--validation_split", "0.5")


def test_a_recipe_is_run_once_for_each_seed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(8):
        (data / f"{'cat' if number % 2 else 'dog'}.{number}.jpg").write_bytes(encode(draw(number, (40, 30)), "JPEG"))
    recipe = tmp_path / "quick.toml"
    recipe.write_text('conv_net = "cat_dog_conv_net"\nepochs = 1\n')
    first = run_recipe(recipe, 3, data, tmp_path / "out", QUICK)
    assert (first.recipe, first.seed, first.count) == ("quick", 3, 4)
    assert first.images_per_s > 0
    assert "Epoch 1/1" in capfd.readouterr().out
    assert run_recipe(recipe, 3, data, tmp_path / "out", QUICK) == first
    assert "Epoch" not in capfd.readouterr().out
    with pytest.raises(TrainingError, match="seed 4 ended with 2"):
        run_recipe(recipe, 4, data, tmp_path / "out", ("--epochs", "0"))


def test_the_table_pools_seeds_with_an_interval() -> None:
    outcomes = [
        Outcome("a", seed, hits, 100, rate) for seed, hits, rate in ((0, 70, 10.0), (1, 72, 12.0), (2, 74, 11.0))
    ]
    line = recipe_table(outcomes).splitlines()[-1]
    assert line == "| a | 0.700, 0.720, 0.740 | 0.720 [0.667, 0.768] of 300 | 11.0 |"


def test_the_recipes_that_come_along_are_understood() -> None:
    from marten.settings import settings_from
    from train_main import build_parser

    for path in sorted(MODELS.glob("*/*.toml")):
        assert settings_from(build_parser().parse_args(["--config", str(path)])).conv_net == path.parent.name
