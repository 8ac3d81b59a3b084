"""Runs told to TensorBoard, W&B and MLflow: what arrives is metrics.jsonl, also over a stop, and off is off."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from marten.errors import CHECKPOINTED, DONE, UsageError
from marten.files import ROOT
from marten.tracking import Tracked, Trackers
from tests.runs import result, run_once
from tests.wandb_server import WandbServer

KEY = "local-" + "0123456789" * 4


def needs(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"needs {name}: requirements-tracking.txt")


@pytest.fixture
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.shutdown()
    server.server_close()


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "model.run" / "metrics.jsonl").read_text().splitlines()]


# a process of its own per start, as on a cluster: what it is told of must survive its end
RUN = """
import sys
from pathlib import Path
from tests.runs import run_once
data, out, stop, *track = sys.argv[1:]
sys.exit(run_once(Path(data), Path(out), int(stop) or None, track=tuple(track), epochs=3))
"""


def start(data: Path, out: Path, stop_after: int, *track: str, **environment: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_", "WB_"))}
    told = subprocess.run(
        [sys.executable, "-c", RUN, str(data), str(out), str(stop_after), *track],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert told.returncode in (DONE, CHECKPOINTED), told.stdout + told.stderr
    assert "is told no more" not in told.stdout
    return told.returncode


def stop_and_go_on(data: Path, out: Path, *track: str, **environment: str) -> list[dict[str, Any]]:
    """Three epochs in two processes; the first one's third is begun, then told of again. Returns metrics.jsonl."""
    assert start(data, out, 9, *track, **environment) == CHECKPOINTED
    assert start(data, out, 0, *track, **environment) == DONE
    return rows_of(out)


@pytest.fixture(scope="module")
def told(drawn_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped and went on, told to all three, none of which needs a network."""
    out = tmp_path_factory.mktemp("told")
    installed = [name for name in ("tensorboard", "wandb", "mlflow") if importlib.util.find_spec(name)]
    stop_and_go_on(drawn_set, out, *installed)
    return out


@needs("tensorboard")
def test_tensorboard_holds_one_curve_over_a_stop(told: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = rows_of(told)
    events = EventAccumulator(str(told / "model.run" / "tensorboard"))
    events.Reload()
    assert {"loss/train", "loss/validation", "accuracy/train", "accuracy/validation", "lr"} <= set(
        events.Tags()["scalars"]
    )
    for tag, name in (("loss/train", "train_loss"), ("accuracy/validation", "validation_accuracy"), ("lr", "lr")):
        curve = [(event.step, event.value) for event in events.Scalars(tag)]
        assert curve == [(row["epoch"], pytest.approx(row[name], rel=1e-6)) for row in rows]


@needs("wandb")
def test_wandb_offline_syncs_to_one_curve_over_a_stop(told: Path, wandb_server: WandbServer) -> None:
    (folder,) = (told / "model.run" / "wandb").glob("offline-run-*")
    own = {"WANDB_BASE_URL": wandb_server.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}
    environment = {**os.environ, **own}
    program = Path(sys.executable).with_name("wandb")
    words = [program, "sync", folder]
    done = subprocess.run(words, cwd=told, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = wandb_server.streams
    assert folder.name.endswith(run)
    assert wandb_server.history(run) == rows_of(told)


@needs("wandb")
def test_wandb_online_goes_on_with_the_same_run(drawn_set: Path, tmp_path: Path, wandb_server: WandbServer) -> None:
    key = {"WANDB_BASE_URL": wandb_server.url, "WANDB_API_KEY": KEY}
    rows = stop_and_go_on(drawn_set, tmp_path, "wandb", **key)
    (run,) = wandb_server.streams
    assert wandb_server.history(run) == rows
    assert KEY not in "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())


@needs("mlflow")
def test_mlflow_goes_on_with_the_same_run(told: Path) -> None:
    code = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient("sqlite:///" + sys.argv[1])
(run,) = client.search_runs([client.get_experiment_by_name("marten").experiment_id])
history = client.get_metric_history
told = {name: [(m.step, m.value) for m in history(run.info.run_id, name)] for name in run.data.metrics}
print(json.dumps({"status": run.info.status, "told": told, "params": run.data.params}))
"""
    words = [sys.executable, "-W", "ignore", "-c", code, str(told / "model.run" / "mlflow.db")]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert found["status"] == "FINISHED"
    assert found["params"]["seed"] == "0"
    for name in ("train_loss", "validation_loss", "validation_accuracy", "lr"):
        assert sorted(found["told"][name]) == [[row["epoch"], row[name]] for row in rows_of(told)]


def test_a_tracker_that_fails_costs_nothing(
    drawn_set: Path,
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Failing:
        def __init__(self, run: Tracked) -> None:
            pass

        def tell(self, row: object) -> None:
            raise ConnectionError("the service is away\nfor a while")

        def close(self, finished: bool) -> None:
            raise AssertionError("it was dropped")

    monkeypatch.setitem(__import__("marten.tracking").tracking._OPEN, "tensorboard", Failing)
    monkeypatch.setitem(__import__("marten.tracking").tracking._MODULES, "tensorboard", "json")
    assert run_once(drawn_set, tmp_path, track=("tensorboard",)) == DONE
    assert capsys.readouterr().out.count("tensorboard is told no more of this run: the service is away\n") == 1
    assert result(tmp_path) == result(whole_run)


def test_what_is_not_installed_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("marten.tracking").tracking._MODULES, "wandb", "no_such_module")
    with pytest.raises(UsageError, match="requirements-tracking"):
        Trackers(("wandb",), Tracked(tmp_path, "a", {}), ())


def test_rates_csv_is_whole_after_a_stop(drawn_set: Path, tmp_path: Path) -> None:
    flags = {"freeze": "1", "lr": (1e-3, 1e-4), "epochs": 3, "schedule": "finetune"}
    assert run_once(drawn_set, tmp_path / "a", **flags) == DONE
    assert run_once(drawn_set, tmp_path / "b", 9, **flags) == CHECKPOINTED
    (tmp_path / "b" / "model.run" / "rates.csv").unlink()
    assert run_once(drawn_set, tmp_path / "b", **flags) == DONE
    assert result(tmp_path / "a") == result(tmp_path / "b")
    texts = [(tmp_path / name / "model.run" / "rates.csv").read_text() for name in "ab"]
    assert texts[0] == texts[1]
