"""Many runs: their lines, their table, the best of them, and Optuna's way through them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from marten.errors import DataError, UsageError
from marten.files import ROOT
from marten.study import optimize
from marten.sweep import Range, drawn, grid, read_choices, write_runs
from marten.sweep_plot import plot_sweep
from marten.sweep_results import best_of, results, table
from tests.schedulers import TRAINING
from tests.test_staging import content


def test_settings_are_lists_and_ranges() -> None:
    choices = read_choices(["--lr=1e-5..1e-2:log", "batch-size=8..64", "augment=flip,none", "dropout=0.1..0.5"])
    assert choices == {
        "lr": Range(1e-5, 1e-2, log=True),
        "batch_size": Range(8, 64, whole=True),
        "augment": ["flip", "none"],
        "dropout": Range(0.1, 0.5),
    }
    trials = drawn(choices, 50, seed=3)
    assert drawn(choices, 10, seed=3) == trials[:10] != drawn(choices, 10, seed=4)
    assert all(1e-5 <= float(t["lr"]) <= 1e-2 and 8 <= int(t["batch_size"]) <= 64 for t in trials)
    assert sum(float(t["lr"]) < 3e-4 for t in trials) > 15, "equal factors are equally likely"


@pytest.mark.parametrize("word", ["lr", "lr=", "=1", "lr=2..1", "lr=0..1:log", "lr=e..1"])
def test_a_setting_that_cannot_be_meant_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="lr="):
        read_choices([word])


def test_a_grid_is_every_combination() -> None:
    assert grid(read_choices(["lr=1,2", "seed=0,1"])) == [
        {"lr": "1", "seed": "0"},
        {"lr": "1", "seed": "1"},
        {"lr": "2", "seed": "0"},
        {"lr": "2", "seed": "1"},
    ]
    with pytest.raises(UsageError, match="--random"):
        grid(read_choices(["lr=1..2"]))


def finish(weights: Path, losses: list[float], finished: bool = True) -> None:
    run = weights.with_suffix(".run")
    run.mkdir(parents=True, exist_ok=True)
    rows = [
        {"epoch": i, "train_loss": 1.0, "validation_loss": loss, "validation_accuracy": 1 - loss / 2}
        for i, loss in enumerate(losses, 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights.touch()
    epochs = len(losses) + (0 if finished else 2)
    weights.with_suffix(".json").write_text(json.dumps({"training": {"epochs": epochs, "early_stop": 0}}))


def test_the_table_has_the_best_first_and_tells_what_still_runs(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    runs = write_runs(folder, grid(read_choices(["lr=1e-3,1e-4,1e-5,1e-6"])))
    assert runs.read_text().splitlines()[1] == f"--lr 1e-4 --model_path {folder}/model_2.pth"
    with pytest.raises(DataError, match="none of the 4 runs"):
        best_of(results(folder))
    finish(folder / "model_1.pth", [0.6, 0.4, 0.5])
    finish(folder / "model_2.pth", [0.3, 0.2], finished=False)
    finish(folder / "model_3.pth", [0.35])
    found = results(folder)
    assert table(found).splitlines() == [
        "run,lr,epochs,best_epoch,validation_accuracy,validation_loss,finished",
        "2,1e-4,2,2,0.9,0.2,no",
        "3,1e-5,1,1,0.825,0.35,yes",
        "1,1e-3,3,2,0.8,0.4,yes",
        "4,1e-6,0,,,,no",
    ]
    assert best_of(found)[0].weights == folder / "model_3.pth"
    with pytest.raises(UsageError, match="another sweep"):
        write_runs(folder, [{"lr": "1"}])
    with pytest.raises(DataError, match="no sweep in"):
        results(tmp_path)


def test_the_plot_shows_the_best_run_and_a_panel_for_each_setting(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_runs(folder, grid(read_choices(["lr=1e-3,1e-4,1e-5", "augment=flip,none", "seed=0"])))
    for number, losses in enumerate(([0.9, 0.5], [0.8], [0.7, 0.65], [0.6, 0.62], [0.5, 0.4]), 1):
        finish(folder / f"model_{number}.pth", losses)
    (folder / "model_2.run" / "pruned").touch()
    plot_sweep(results(folder), folder / "results.png")
    with Image.open(folder / "results.png") as drawn:
        assert drawn.width == pytest.approx(3 * 4.6 * 110, abs=2), "the curves, lr and augment; seed was not varied"
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 24) or []}
    assert {(0x1F, 0x6F, 0xEB), (0x6B, 0x72, 0x80), (0xC9, 0xCE, 0xD6)} <= colours
    states = [(result.name, result.state) for result in results(folder)]
    assert states == [("5", "finished"), ("1", "finished"), ("4", "finished"), ("3", "finished"), ("2", "pruned"),
                      ("6", "unfinished")]  # fmt: skip
    assert table(results(folder)).splitlines()[5].endswith(",pruned")


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs Optuna: requirements-sweep.txt")
def test_optuna_prunes_fails_and_goes_on_from_its_journal(tmp_path: Path) -> None:
    lines: list[str] = []

    def train(line: str, hopeless: Callable[[], bool]) -> int:
        lines.append(line)
        words = line.split()
        lr = float(words[words.index("--lr") + 1])
        weights = Path(words[-1])
        if lr > 0.9:
            return 1
        for epoch in (1, 2, 3, 4):
            finish(weights, [abs(lr - 0.5) + 0.1] * epoch)
            (weights.with_suffix(".run") / "checkpoint.pt").touch()
            if epoch < 4 and hopeless():
                return 85
        (weights.with_suffix(".run") / "checkpoint.pt").unlink()
        return 0

    choices = read_choices(["lr=0.0..1.0"])
    optimize(tmp_path, choices, 12, 0, train)
    code = optimize(tmp_path, choices, 12, 1, train)
    assert code == any(float(line.split()[1]) > 0.9 for line in lines[12:]), "a failed run was not told, or none failed"
    assert optimize(tmp_path / "stopped", choices, 3, 0, lambda line, hopeless: 85) == 85
    assert len(results(tmp_path / "stopped")) == 1, "a stopped run ends the study"
    assert optimize(tmp_path / "failed", choices, 2, 0, lambda line, hopeless: 1) == 1
    assert len(lines) == 24
    found = results(tmp_path)
    assert len(found) == 24
    assert abs(float(found[0].settings["lr"]) - 0.5) < 0.1
    assert {result.epochs for result in found} >= {1, 4}, "nothing was pruned"
    pruned = [result for result in found if result.state == "pruned"]
    assert pruned
    assert not [result for result in pruned if list(result.weights.with_suffix(".run").glob("checkpoint*"))]


def sweep(*words: str, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "sweep"), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix, **changes}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_the_command_shows_its_runs_and_refuses_typos_before_the_first(tmp_path: Path) -> None:
    shown = sweep("run", "--vary", "lr=1,2", "--folder", "out", "--dry_run", "--", "--conv_net", "vgg", folder=tmp_path)
    assert shown.stdout.splitlines() == ["--lr 1 --model_path out/model_1.pth", "--lr 2 --model_path out/model_2.pth"]
    typo = sweep("run", "--vary", "lrr=1,2", "--folder", "typo", "--", "--conv_net", "vgg", folder=tmp_path)
    assert typo.returncode == 2
    assert "unrecognized arguments: --lrr 1" in typo.stderr
    assert not [path for path in content(tmp_path) if path.endswith(".pth")]


@pytest.mark.parametrize(("cluster", "program"), [("htcondor", "condor_submit"), ("slurm", "sbatch"), ("pbs", "qsub")])
def test_no_scheduler_on_this_machine_is_one_line(tmp_path: Path, cluster: str, program: str) -> None:
    (tmp_path / "bin").mkdir()
    words = ("run", "--vary", "lr=1,2", "--folder", "out", "--cluster", cluster, "--", "--conv_net", "vgg")
    done = sweep(*words, folder=tmp_path, PATH=str(tmp_path / "bin"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"there is no {program} on this machine" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_sweep_runs_here_and_again_does_nothing(tmp_path: Path) -> None:
    from tests.schedulers import prepare

    prepare(tmp_path)
    words = ("run", "--vary", "lr=1e-3,1e-2", "--folder", "out", "--python", sys.executable)
    flags = ("--", *TRAINING.split(), "--epochs", "1")
    first = sweep(*words, *flags, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    again = sweep(*words, *flags, folder=tmp_path)
    assert again.stdout == "2 runs, 0 of them now, 0 failed: scripts/sweep table --folder out\n"
    told = sweep("table", "--folder", "out", folder=tmp_path)
    assert len(told.stdout.splitlines()) == 3
    assert sweep("best", "--folder", "out", folder=tmp_path).stdout.startswith("out/model_")
