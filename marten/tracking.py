"""Telling TensorBoard, W&B or MLflow of each epoch, beside metrics.jsonl, which is always written.

Every tracker is told the run's own history, so a curve never forks: what a stopped run had told beyond its checkpoint
is cut off where that can be done (TensorBoard, W&B offline), and elsewhere not told twice (W&B online, MLflow), where
a resumed run comes to the same numbers. A tracker only looks on: one that fails is named, dropped, and costs nothing.

    tensorboard  <model>.run/tensorboard    tensorboard --logdir models
    wandb        <model>.run/wandb          offline without WANDB_API_KEY: wandb sync models/*.run/wandb/offline-run-*
    mlflow       <model>.run/mlflow.db      or what MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say

W&B's key, project, entity and mode are read from WANDB_API_KEY, WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE alone.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from marten.errors import UsageError
from marten.progress import say

Row = Mapping[str, Any]
_MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


@dataclass
class Tracked:
    """What a run is called by those who are told of it.

    Attributes:
        folder: of the run.
        name: for people.
        settings: plain data that shaped the run.
        ids: by tracker; kept in the checkpoint, so that a resumed run is the same one to them.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    ids: dict[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """One who is told."""

    def tell(self, row: Row) -> None:
        """Take the row of one epoch."""

    def close(self, finished: bool) -> None:
        """Take leave: the run is finished, or will go on later."""


class Trackers:
    """All who are told of a run.

    Args:
        names: "tensorboard", "wandb", "mlflow".
        run: what it is called; its ids are added to.
        history: rows of the epochs that are behind it.

    Raises:
        UsageError: a tracker is not installed.
    """

    def __init__(self, names: Sequence[str], run: Tracked, history: Sequence[Row]) -> None:
        missing = [name for name in names if importlib.util.find_spec(_MODULES[name]) is None]
        if missing:
            raise UsageError(f"--track {' '.join(missing)}: not installed: pip install -r requirements-tracking.txt")
        self._told = 0
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            self._safely(name, lambda name=name: self._trackers.update({name: _OPEN[name](run)}))  # type: ignore[misc]
        self.tell(history)

    def tell(self, history: Sequence[Row]) -> None:
        """Tell the rows that are new."""
        for row in history[self._told :]:
            for name, tracker in list(self._trackers.items()):
                self._safely(name, lambda tracker=tracker, row=row: tracker.tell(row))  # type: ignore[misc]
        self._told = len(history)

    def close(self, finished: bool) -> None:
        """Take leave of all."""
        for name, tracker in list(self._trackers.items()):
            self._safely(name, lambda tracker=tracker: tracker.close(finished))  # type: ignore[misc]
        self._trackers.clear()

    def _safely(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # of whatever kind: a service that is away must not cost the run
            self._trackers.pop(name, None)
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            say(f"{name} is told no more of this run: {reason}")


def _numbers(row: Row) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if isinstance(value, int | float)}


# ------------------------------------------------------------------------------------------------------ TensorBoard


class _TensorBoard:
    """Event files, written anew from the history by each process: the curve is whole, whatever an earlier one left."""

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        for stale in folder.glob("events.out.tfevents.*"):
            stale.unlink()
        self._writer = SummaryWriter(str(folder))
        settings = "\n".join(f"    {name} = {value!r}" for name, value in run.settings.items())
        self._writer.add_text("settings", settings)

    def tell(self, row: Row) -> None:
        for name, value in _numbers(row).items():
            part, _, figure = name.partition("_")
            tag = f"{figure}/{part}" if figure else name  # loss/train beside loss/validation
            self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


# -------------------------------------------------------------------------------------------------------------- W&B


class _Wandb:
    """A run of W&B. Offline, each process leaves one folder that holds the whole curve, and the earlier ones go."""

    def __init__(self, run: Tracked) -> None:
        # decided before W&B is imported: it would ask for a key, and a job on a cluster would wait for ever
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own mishaps, told to its makers over the network
        import wandb

        id_ = run.ids.setdefault("wandb", uuid.uuid4().hex[:8])
        if mode == "offline":
            for stale in (run.folder / "wandb").glob(f"offline-run-*-{id_}"):
                shutil.rmtree(stale, ignore_errors=True)
        run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            id=id_,
            name=run.name,
            dir=str(run.folder),
            project=os.environ.get("WANDB_PROJECT") or "marten",
            config=dict(run.settings),
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )
        self._from = int(self._run.starting_step) if mode == "online" else 0

    def tell(self, row: Row) -> None:
        if row["epoch"] >= self._from:  # W&B knows its next step, and would drop earlier ones with a warning
            self._run.log(_numbers(row), step=int(row["epoch"]))

    def close(self, finished: bool) -> None:
        self._run.finish(0 if finished else 1)


# ----------------------------------------------------------------------------------------------------------- MLflow


class _MLflow:
    """A run of MLflow, on a server or in a file of its own."""

    def __init__(self, run: Tracked) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        run.folder.mkdir(parents=True, exist_ok=True)
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run.folder / 'mlflow.db').absolute()}"
        self._client = MlflowClient(place)
        self._last = 0
        if "mlflow" not in run.ids or not self._is_known(run.ids["mlflow"]):
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "marten"
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self._client.create_experiment(experiment)
            run.ids["mlflow"] = self._client.create_run(number, run_name=run.name).info.run_id
            told = [Param(name, json.dumps(value)) for name, value in run.settings.items()]
            self._client.log_batch(run.ids["mlflow"], params=told)
        self._id = run.ids["mlflow"]
        self._client.update_run(self._id, "RUNNING")

    def _is_known(self, id_: str) -> bool:
        """Whether the run is there, as it is not on another machine's disk; notes the last epoch that it was told."""
        from mlflow.exceptions import MlflowException

        try:
            told = self._client.get_metric_history(id_, "epoch")
        except MlflowException:
            return False
        self._last = max((int(metric.value) for metric in told), default=0)
        return bool(told) or bool(self._client.get_run(id_))

    def tell(self, row: Row) -> None:
        import time

        from mlflow.entities import Metric

        if row["epoch"] > self._last:
            now = int(time.time() * 1000)
            metrics = [Metric(name, value, now, row["epoch"]) for name, value in _numbers(row).items()]
            self._client.log_batch(self._id, metrics=metrics)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


_OPEN: dict[str, Callable[[Tracked], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow}
