"""The page of a sweep: which settings mattered, every run, and nothing that its reader would have to fetch."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from marten.charts import parallel
from marten.files import ROOT
from marten.sweep_report import importances, sweep_page
from marten.sweep_results import PRUNED, results
from tests.test_report import Page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen runs whose loss lr decides, dropout touches, and augment does not; two of them were ended early."""
    made = tmp_path_factory.mktemp("sweep")
    lines = []
    for n in range(16):
        lr, dropout = 10 ** (-5 + (n * 7 % 16) / 4), 0.1 + (n * 5 % 16) / 40
        augment = "flip" if n % 3 else "none"
        weights = made / f"model_{n:02}.pth"
        lines.append(f"--lr {lr:.4g} --dropout {dropout:.3g} --augment {augment} --model_path {weights}")
        run = weights.with_suffix(".run")
        run.mkdir()
        best = 0.2 + 0.3 * (math.log10(lr) + 3) ** 2 + 0.05 * dropout
        epochs = 2 if n in (5, 11) else 4
        rows = [
            {
                "epoch": e,
                "train_loss": 1.0,
                "validation_loss": best + (4 - e) / 10,
                "validation_accuracy": 1 / (1 + best),
            }
            for e in range(1, epochs + 1)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if n in (5, 11):
            (run / PRUNED).touch()
        weights.touch()
        weights.with_suffix(".json").write_text(json.dumps({"training": {"epochs": 4}}))
    (made / "runs.txt").write_text("\n".join(lines) + "\n")
    return made


def test_the_page_tells_every_run_and_needs_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marten.sweep_report._origin", lambda begun: "")  # these cards hold no more than a state
    found = results(folder)
    text = sweep_page(folder, found)
    page = Page(text)
    assert not re.search(r"""(?:src|href)=|url\(|@import|<script|https?://""", text)
    drawn = text.split("How settings go together")[1].split("</svg>")[0]
    assert drawn.count("<polyline") == 16
    for result in found:
        assert f"{result.loss:.4f}" in page.text
    assert "14 finished, 2 ended early" in page.text
    assert page.text.index(f"run {found[0].name}") < page.text.index("Runs, the best first")


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs Optuna: requirements-sweep.txt")
def test_what_decided_is_told_to_have_decided(folder: Path) -> None:
    shares = importances(results(folder))
    assert set(shares) == {"lr", "dropout", "augment"}
    assert sum(shares.values()) == pytest.approx(1)
    assert next(iter(shares)) == "lr"
    assert shares["lr"] > 0.5
    assert importances(results(folder)[:3]) == {}


def test_axes_are_spread_by_value_by_decade_or_by_word() -> None:
    axes: dict[str, list[str | float]] = {"lr": [1e-5, 1e-3, 1e-1], "net": ["b", "a", "b"], "seed": [7.0, 7.0, 7.0]}
    text = parallel("three runs", axes, [0.5, 0.1, 0.9])
    lines = re.findall(r'points="([^"]+)"', text)
    heights = [[float(point.split(",")[1]) for point in line.split()] for line in lines]
    worst, middle, best = heights
    assert best[0] == pytest.approx((worst[0] + middle[0]) / 2)  # a thousandth lies midway by decades
    assert best[1] > worst[1] == middle[1]
    assert best[2] == worst[2] == middle[2]
    assert "s1" in text.split("<polyline")[-1]


def test_the_command_writes_the_page(folder: Path, tmp_path: Path) -> None:
    for card in folder.glob("*.json"):
        card.rename(tmp_path / card.name)  # runs on other machines have left no card here yet
    words = [sys.executable, ROOT / "scripts" / "report", "--sweep", folder, "--out", tmp_path / "page.html"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert told.returncode == 0, told.stderr
    assert "0 finished, 2 ended early, 14 under way" in (tmp_path / "page.html").read_text()
    assert "<title>Sweep" in (tmp_path / "page.html").read_text()
