"""Train a network to tell treatments apart by single cells; what it learns on the way is the profile.

One run lies in outputs/EXP: checkpoint/model.pth with its card, checkpoint/checkpoint.pt while it is under way,
logs/log.csv. Stopped at any batch it goes on to the same bits; everything random is drawn by seed and place.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from marten.alone import alone
from marten.cells.crop_batches import CropBatches, CropSet
from marten.cells.endpoint import strip_preprocess
from marten.cells.errors import CellsError
from marten.cells.learner import CellLearner
from marten.cells.networks import TRAINED, network_args
from marten.cells.project import Project
from marten.cells.scores import Scores
from marten.checkpoint import load_checkpoint, paths_of, save_checkpoint
from marten.devices import Runtime
from marten.errors import CHECKPOINTED, DONE, UsageError
from marten.files import write_text
from marten.interrupt import Interrupt
from marten.metrics import share_with_interval
from marten.progress import Bar, say
from marten.provenance import provenance
from marten.weights import save_model
from modelspec import ModelCard, ModelSpec

COLUMNS = (
    *("epoch", "acc", "loss", "top_k"),
    *("val_acc", "val_loss", "val_top_k", "val_macro_f1", "val_balanced_acc", "val_class_precision", "lr"),
)
"""Of log.csv."""


@dataclass
class _State:
    """Where a run stands."""

    epoch: int = 0
    batch: int = 0
    seen: Scores | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=lambda: {"loss": math.inf, "epoch": -1, "state": None})


class CellTraining:
    """A training in progress.

    Args:
        project: with crops that `sample` or `export` wrote.
        runtime: device and precision.
        seed: of everything random.
        table: of the crops, in their folder.
        workers: threads that read crops; None takes train.sampling.workers.

    Raises:
        MartenError: crops, configuration or weights that cannot be trained with.
    """

    def __init__(
        self,
        project: Project,
        runtime: Runtime,
        seed: int = 0,
        table: str = "sc-metadata.csv",
        workers: int | None = None,
    ) -> None:
        config = project.config
        self.project, self.config, self.runtime, self.seed = project, config, runtime, seed
        self.crops = CropSet(config, project.crops, table)
        read_with = int(config["train.sampling.workers"]) if workers is None else workers
        self.batches = CropBatches(self.crops, read_with, int(config["train.sampling.cache_size"]))
        self.batch_size = int(config["train.model.params.batch_size"])
        self.epochs = int(config["train.model.epochs"])
        arch, args = network_args(config)
        self.spec = ModelSpec(
            name=project.experiment,
            arch=arch,
            labels=self.crops.labels,
            arch_args={**args, "num_classes": len(self.crops.labels), "strips": True},
            preprocess=strip_preprocess(config),
        )
        self.learner = CellLearner(config, self.crops, self.spec, runtime, seed)
        self.at = _State()

    # ------------------------------------------------------------------------------------------------- the run

    def go_on(self, interrupt: Interrupt) -> int:
        """Train to the end or to the next stop; returns 0 or 85."""
        self._announce()
        with _threads(1 if self._is_small() else torch.get_num_threads()):
            return self._go_on(interrupt)

    def _is_small(self) -> bool:
        """Whether one core is enough: layers so small that cores which share them mostly wait for each other."""
        return self.runtime.device.type == "cpu" and self.config["train.model.name"] == "cnn"

    def _go_on(self, interrupt: Interrupt) -> int:
        while self.at.epoch < self.epochs:
            if not (self._train_epoch(interrupt) and self._finish_epoch(interrupt)):
                self.save()
                say(f"Stopped by {interrupt.reason} in epoch {self.at.epoch}, batch {self.at.batch}; run me again.")
                return CHECKPOINTED
            if self.at.epoch < self.epochs:
                self.save()
        self._finish()
        return DONE

    def _train_epoch(self, interrupt: Interrupt) -> bool:
        """Train from the present batch to the end of the epoch; False when interrupted, the state being whole."""
        order = self.crops.epoch_order(self.seed, self.at.epoch)
        steps = -(-len(order) // self.batch_size)
        self.learner.begin_epoch(self.at.epoch, [row["val_loss"] for row in self.at.history])
        if self.at.seen is None:
            self.at.seen = self.learner.scores()
        started, first = time.monotonic(), self.at.batch
        batches = self.batches.read(order, self.batch_size, self.at.batch)
        with Bar(f"Epoch {self.at.epoch}", steps) as bar:
            while self.at.batch < steps:
                rows = order[self.at.batch * self.batch_size : (self.at.batch + 1) * self.batch_size]
                self.learner.learn(next(batches), rows, self.at.epoch, self.at.batch, self.at.seen)
                self.at.batch += 1
                bar.step(self.at.batch, f"loss {self.at.seen.loss:.4f}" if bar.wants_note() else "")
                if interrupt.reason and self.at.batch < steps:
                    return False
        self._pace = (self.at.batch - first) * self.batch_size / max(time.monotonic() - started, 1e-9)
        return True

    def _finish_epoch(self, interrupt: Interrupt) -> bool:
        """Validate, keep the best, write the log; False when interrupted, the state being that of the last batch."""
        assert self.at.seen is not None
        seen, epoch = self.at.seen, self.at.epoch
        row: dict[str, Any] = {"epoch": epoch, "acc": seen.accuracy, "loss": seen.loss, "top_k": seen.top_k_accuracy}
        frequency = int(self.config["train.validation.frequency"])
        is_judged = (epoch + 1) % frequency == 0 or epoch + 1 == self.epochs
        judged = self._validate(interrupt) if is_judged else None
        if is_judged and judged is None:
            return False
        if judged is not None:
            row |= {
                "val_acc": judged.accuracy,
                "val_loss": judged.loss,
                "val_top_k": judged.top_k_accuracy,
                "val_macro_f1": judged.macro_f1,
                "val_balanced_acc": judged.balanced_accuracy,
                "val_class_precision": judged.class_precision,
            }
        else:
            row |= {name: self.at.history[-1][name] if self.at.history else math.nan for name in COLUMNS[4:10]}
        row["lr"] = self.learner.lr
        self.at.history.append(row)
        if judged is not None and judged.loss <= self.at.best["loss"]:
            state = {name: t.detach().cpu().clone() for name, t in self.learner.network.state_dict().items()}
            self.at.best = {"loss": judged.loss, "epoch": epoch, "state": state, "scores": judged.summary()}
            self._save_best()
        self._write_log()
        say(
            f"Epoch {epoch}: loss {row['loss']:.4f} acc {row['acc']:.4f} | validation loss {row['val_loss']:.4f} acc "
            f"{row['val_acc']:.4f} macro F1 {row['val_macro_f1']:.4f} | lr {row['lr']:.3g}, {self._pace:.0f} crops/s"
        )
        self.at.epoch, self.at.batch, self.at.seen = epoch + 1, 0, None
        return True

    def _validate(self, interrupt: Interrupt) -> Scores | None:
        """Judge the network on every validation crop, always the same ones, each once; None when interrupted."""
        rows = self.crops.validation if len(self.crops.validation) else self.crops.training
        size = int(self.config["train.validation.batch_size"])
        return self.learner.judge(self.batches.read(rows, size), rows, size, lambda: bool(interrupt.reason))

    def _finish(self) -> None:
        for path in paths_of(self.project.checkpoints / "checkpoint.pt"):
            path.unlink(missing_ok=True)
        best = self.at.history[self.at.best["epoch"]]
        say(
            f"Best epoch {self.at.best['epoch']}: validation accuracy {best['val_acc']:.4f} on "
            f"{len(self.crops.validation)} crops. Model at {self.project.checkpoints / TRAINED}"
        )

    # ----------------------------------------------------------------------------------------------- the state

    def save(self) -> None:
        """Write the checkpoint: everything that the rest of the run depends on."""
        state = {
            "run": self._digest(),
            "epoch": self.at.epoch,
            "batch": self.at.batch,
            "seen": None if self.at.seen is None else self.at.seen.state(),
            **self.learner.state(),
            "history": self.at.history,
            "best": self.at.best,
        }
        save_checkpoint(self.project.checkpoints / "checkpoint.pt", state)

    def resume(self) -> None:
        """Go back to the state of the checkpoint, if there is one.

        Raises:
            UsageError: it belongs to another configuration, seed or set of crops.
        """
        found = load_checkpoint(self.project.checkpoints / "checkpoint.pt")
        if found is None:
            return
        state, path = found
        if state["run"] != self._digest():
            raise UsageError(
                f"{path} is the checkpoint of another run (configuration, seed, crops or precision differ): remove it "
                "to start anew, or give another --exp"
            )
        seen = None if state["seen"] is None else self.learner.scores(state["seen"])
        self.at = _State(state["epoch"], state["batch"], seen, state["history"], state["best"])
        self.learner.load_state(state)
        if self.at.best["state"] is not None:
            self._save_best()
        say(f"Resuming from {path}: epoch {self.at.epoch}, batch {self.at.batch}")

    def _digest(self) -> str:
        """Tells whether a checkpoint belongs to this run."""
        values = {key: value for key, value in self.config.values.items() if key.startswith(("train.", "dataset."))}
        for idle in ("train.sampling.workers", "train.sampling.cache_size", "train.validation.frame"):
            values.pop(idle, None)
        text = json.dumps(
            [values, self.seed, self.runtime.precision, self._crops_digest()], sort_keys=True, default=str
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _crops_digest(self) -> str:
        names = "\n".join(f"{row['Image_Name']}\t{row['Key']}" for row in self.crops.reader.rows)
        return hashlib.sha256(names.encode()).hexdigest()

    # ------------------------------------------------------------------------------------------------- details

    def _announce(self) -> None:
        count = sum(p.numel() for p in self.learner.network.parameters())
        say(
            f"{self.spec.arch}: {count:,} parameters, {self.learner.origin} first weights, on {self.runtime}; "
            f"{len(self.crops.training)} training crops of {len(self.crops.labels)} classes, balanced to "
            f"{self.crops.per_epoch} an epoch; {len(self.crops.validation)} validation crops ({self.crops.told})"
        )

    def _save_best(self) -> None:
        metrics = self.at.best["scores"]
        chosen = self.at.history[self.at.best["epoch"]] if len(self.at.history) > self.at.best["epoch"] else {}
        hits, count = int(metrics["hits"]), int(metrics["count"])
        card = ModelCard(
            spec=self.spec,
            weights_sha256="",
            data={
                "name": "single cells",
                "channels": self.config.channels,
                "box_px": int(self.config["dataset.locations.box_size"]),
                "masked": bool(self.config["dataset.locations.mask_objects"]),
                "normalisation": "each channel of each crop from its minimum and maximum to 0..1",
                "digest": self._crops_digest(),
                "train": len(self.crops.training),
                "validation": len(self.crops.validation),
                "split": self.crops.told,
            },
            training={
                **{key: v for key, v in self.config.values.items() if key.startswith("train.")},
                "seed": self.seed,
                "started_from": self.learner.origin,
                "best_epoch": self.at.best["epoch"],
            },
            metrics={
                "validation_accuracy": share_with_interval(hits, count),
                "validation_loss": {"value": self.at.best["loss"], "count": count},
                **{name: {"value": chosen[name], "count": count} for name in COLUMNS[7:10] if name in chosen},
            },
            provenance=provenance(),
        )
        save_model(self.project.checkpoints / TRAINED, self.at.best["state"], card)

    def _write_log(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.at.history)
        write_text(self.project.logs / "log.csv", text.getvalue())
        soft = self.learner.soft
        if soft is not None:
            rows = io.StringIO()
            table = csv.writer(rows, lineterminator="\n")
            table.writerow(["Image_Name", *self.crops.labels])
            for number in self.crops.training:
                name = self.crops.reader.rows[number]["Image_Name"]
                table.writerow([name, *(f"{value:.6f}" for value in soft[number].tolist())])
            write_text(self.project.results / "soft_labels" / f"{self.at.epoch:04d}.csv", rows.getvalue())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_cells(
    project: Project,
    runtime: Runtime,
    *,
    seed: int = 0,
    table: str = "sc-metadata.csv",
    workers: int | None = None,
    max_runtime_s: float = 0.0,
    fresh: bool = False,
) -> int:
    """Train, or go on training, on the crops of a project.

    Args:
        project: with crops.
        runtime: device and precision.
        seed: of everything random.
        table: of the crops.
        workers: threads that read crops.
        max_runtime_s: seconds after which to checkpoint and return 85; 0 for no limit.
        fresh: train anew although a model of this experiment is there.

    Returns:
        0 when finished, 85 when saved and to be started again.

    Raises:
        CellsError: a finished model of this experiment is there, and `fresh` is not asked for.
        TrainingError: another process trains this experiment.
    """
    checkpoint, model = project.checkpoints / "checkpoint.pt", project.checkpoints / TRAINED
    if model.is_file() and not checkpoint.is_file() and not fresh:
        raise CellsError(f"{model} is there already: add --overwrite to train anew, or give another --exp")
    interrupt = Interrupt(max_runtime_s)
    with alone(project.checkpoints):
        if fresh:
            for path in paths_of(checkpoint):
                path.unlink(missing_ok=True)
        training = CellTraining(project, runtime, seed, table, workers)
        training.resume()
        return training.go_on(interrupt)
