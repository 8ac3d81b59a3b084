"""One training run, from a folder of pictures to weights with their card, stopped and resumed without a trace.

The path is short: find and inspect the pictures, split them, build the network, then for each epoch train, validate,
keep the best. Everything that the result depends on is in the settings or in the checkpoint; see marten.streams.
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
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from marten.architectures import Architecture, build_network, find_architecture
from marten.batches import Batches, Pictures, available_cpus
from marten.checkpoint import load_checkpoint, save_checkpoint
from marten.datasets import PictureSet, Sample, find_pictures, inspect, split
from marten.devices import choose_runtime
from marten.errors import CHECKPOINTED, DONE, TrainingError, UsageError
from marten.files import write_text
from marten.interrupt import Interrupt
from marten.metrics import Running, share_with_interval
from marten.plots import plot_curves
from marten.progress import Bar, say
from marten.provenance import provenance
from marten.schedules import learning_rate_factor
from marten.settings import Settings
from marten.streams import stream
from marten.weights import save_model, start_weights
from modelspec import ModelCard, ModelSpec

History = list[dict[str, Any]]


def train(settings: Settings) -> int:
    """Train, or go on training, as the settings say; writes the weights, the card and the run folder.

    Returns:
        0 when the run is finished, 85 when its state is saved and it wishes to be started again.

    Raises:
        MartenError: data, weights, device or settings that cannot be trained with.
    """
    interrupt = Interrupt(settings.max_runtime_s)
    run = Run(settings)
    try:
        run.resume()
        return run.go_on(interrupt)
    finally:
        run.batches.close()
        run.held_out.close()


class Run:
    """A run in progress: the network, its optimizer, where it stands, and what it has seen.

    Args:
        settings: of the run.

    Raises:
        MartenError: as `train`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.architecture = find_architecture(settings.conv_net)
        self.runtime = choose_runtime(settings.device, settings.precision)
        self.pictures = _look_at(settings, self.architecture)
        self.training, self.validation = split(self.pictures.samples, settings.validation_split, settings.seed)
        self.spec = _spec(settings, self.architecture, self.pictures.labels)
        device = self.runtime.device

        torch.manual_seed(stream(settings.seed, "weights"))
        network = build_network(self.spec.arch, self.spec.arch_args)
        self.origin = start_weights(network, self.architecture, settings.weights)
        self.network = network.to(device).to(memory_format=torch.channels_last)
        head = [p for name, p in network.named_parameters() if name.startswith(self.architecture.head)]
        backbone = [p for name, p in network.named_parameters() if not name.startswith(self.architecture.head)]
        self._backbone = backbone
        self._base_lr = (settings.lr[0], settings.lr[-1])
        self.optimizer = torch.optim.AdamW(
            [{"params": head}, {"params": backbone}],
            lr=settings.lr[0],
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.runtime.precision == "fp16")
        self.average = (
            AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)  # type: ignore[no-untyped-call]
            if settings.ema
            else None
        )
        self.loss = nn.CrossEntropyLoss(reduction="none", label_smoothing=settings.label_smoothing)
        workers = settings.num_workers if settings.num_workers >= 0 else min(8, available_cpus())
        pre = self.spec.preprocess
        pin = device.type == "cuda"
        pictures = Pictures(self.training, pre, settings.augment, settings.seed)
        self.batches = Batches(pictures, settings.batch_size, shuffle=True, workers=workers, pin=pin)
        held_out = Pictures(self.validation, pre)
        self.held_out = Batches(held_out, settings.batch_size, shuffle=False, workers=workers, pin=pin)

        self.epoch = 0
        self.batch = 0
        self.running = Running(device)
        self.history: History = []
        self.best: dict[str, Any] = {"loss": math.inf, "epoch": -1, "state": None}
        self._saved_at = time.monotonic()
        self._waited_s = 0.0

    # ------------------------------------------------------------------------------------------ the run

    def go_on(self, interrupt: Interrupt) -> int:
        """Run to the end or to the next stop; returns 0 or 85."""
        settings = self.settings
        self._announce()
        while self.epoch < settings.epochs and not self._gave_up():
            started = time.monotonic()
            if not self._train_epoch(interrupt):
                return self._stop(interrupt.reason)
            self._finish_epoch(time.monotonic() - started)
            if self.epoch < settings.epochs and self._checkpoint_is_due():
                self.save()
                if settings.self_checkpoint:
                    say(f"Checkpoint after epoch {self.epoch}: exit {CHECKPOINTED}, run me again.")
                    return CHECKPOINTED
            if self.epoch < settings.epochs and interrupt.reason:
                return self._stop(interrupt.reason)
        self._finish()
        return DONE

    def _train_epoch(self, interrupt: Interrupt) -> bool:
        """Train from `self.batch` to the end of the epoch; False when interrupted, the state being whole."""
        self._thaw()
        steps = len(self.batches)
        self._waited_s = 0.0
        batches = self.batches.epoch(self.epoch, self.batch)
        with Bar(f"Epoch {self.epoch + 1}/{self.settings.epochs}", steps) as bar:
            while self.batch < steps:
                waiting = time.monotonic()
                pixels_NHWC, labels_N = next(batches)
                self._waited_s += time.monotonic() - waiting
                self._step(pixels_NHWC, labels_N, self.epoch * steps + self.batch, self.settings.epochs * steps)
                self.batch += 1
                note = f"loss {self.running.loss:.4f}  acc {self.running.accuracy:.4f}" if bar.wants_note() else ""
                bar.step(self.batch, note)
                if interrupt.reason:
                    return False
                if self._minutes_are_over():
                    self.save()
        return True

    def _step(self, pixels_NHWC: torch.Tensor, labels_N: torch.Tensor, step: int, steps: int) -> None:
        device = self.runtime.device
        # dropout and the like draw from here: a function of the place in the run, so nothing of it is saved
        torch.manual_seed(stream(self.settings.seed, "step", step))
        factor = learning_rate_factor(self.settings.schedule, step, steps)
        for group, base in zip(self.optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * factor
        images_NCHW = self.spec.preprocess.normalize(pixels_NHWC.to(device, non_blocking=True))
        labels_N = labels_N.to(device, non_blocking=True)
        with self.runtime.autocast():
            logits_NK = self.network(images_NCHW)
        losses_N = self.loss(logits_NK.float(), labels_N)
        self.optimizer.zero_grad()
        self.scaler.scale(losses_N.mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.running.add(losses_N, logits_NK.argmax(1) == labels_N)

    def _finish_epoch(self, seconds: float) -> None:
        """Validate, keep the best, write the metrics; the run then stands at the start of the next epoch."""
        measured: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": (self.epoch + 1) * len(self.batches),
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": self.running.loss,
            "train_accuracy": self.running.accuracy,
            "train_count": self.running.count,
        }
        if self.validation:
            held_out = self._validate(self._candidate(), self.epoch)
            measured |= {
                "validation_loss": held_out.loss,
                "validation_accuracy": held_out.accuracy,
                "validation_count": held_out.count,
            }
        judged = measured.get("validation_loss", measured["train_loss"])
        if not math.isfinite(judged) or not math.isfinite(measured["train_loss"]):
            raise TrainingError(
                f"the loss is {judged} after epoch {self.epoch + 1}: try a lower --lr or --precision fp32"
            )
        self.history.append(measured)
        say(_told(measured, self.settings.epochs, seconds, self._waited_s))
        if judged <= self.best["loss"]:
            self._keep_best(judged)
        self._write_metrics(seconds)
        self.epoch += 1
        self.batch = 0
        self.running = Running(self.runtime.device)

    def _keep_best(self, loss: float) -> None:
        kind, before = "Val" if self.validation else "Train", self.best["loss"]
        say(f"{kind} loss decreased {before:.6f} --> {loss:.6f}. Saving model at {self.settings.weights_path}")
        state = {name: t.detach().cpu().clone() for name, t in self._candidate().state_dict().items()}
        self.best = {"loss": loss, "epoch": self.epoch, "state": state}
        self._save_best(self.history[-1])

    def _save_best(self, measured: dict[str, Any]) -> None:
        metrics: dict[str, Any] = {}
        if self.validation:
            hits = round(measured["validation_accuracy"] * measured["validation_count"])
            metrics["validation_accuracy"] = share_with_interval(hits, measured["validation_count"])
            metrics["validation_loss"] = {"value": measured["validation_loss"], "count": measured["validation_count"]}
        save_model(self.settings.weights_path, self.best["state"], self._card(metrics))

    def _finish(self) -> None:
        """Judge the best weights once more as the server will run them, in fp32, and tell how it went."""
        if self.validation:
            self.network.load_state_dict(self.best["state"])
            with _threads(available_cpus()):
                served = self._validate(self.network, self.epoch, precise=True)
            chosen = self.history[self.best["epoch"]]
            self._save_best(chosen | {"validation_loss": served.loss, "validation_accuracy": served.accuracy})
            low, high = share_with_interval(round(served.accuracy * served.count), served.count)["interval_95"]  # type: ignore[misc]
            say(
                f"Best epoch {self.best['epoch'] + 1}: validation accuracy {served.accuracy:.4f}"
                f" [{low:.4f}, {high:.4f}] on {served.count} pictures, loss {served.loss:.4f}"
            )
        for name in ("checkpoint.pt", "checkpoint.prev.pt"):
            (self.settings.run_folder / name).unlink(missing_ok=True)
        say(f"End of training. Model at {self.settings.weights_path}, curves at {self.settings.run_folder}/curves.png")

    @torch.inference_mode()
    def _validate(self, network: nn.Module, epoch: int, precise: bool = False) -> Running:
        """Loss and accuracy on the held-out pictures, each counted once, by the transform that serves."""
        network.eval()
        seen = Running(self.runtime.device)
        for pixels_NHWC, labels_N in self.held_out.epoch(epoch):
            images_NCHW = self.spec.preprocess.normalize(pixels_NHWC.to(self.runtime.device))
            labels_N = labels_N.to(self.runtime.device)
            if precise:
                logits_NK = self.spec.logits(network, images_NCHW)
            else:
                with self.runtime.autocast():
                    logits_NK = self.spec.logits(network, images_NCHW)
            losses_N = nn.functional.cross_entropy(logits_NK, labels_N, reduction="none")
            seen.add(losses_N, logits_NK.argmax(1) == labels_N)
        return seen

    # -------------------------------------------------------------------------------------- the state

    def save(self) -> None:
        """Write the checkpoint: everything that the rest of the run depends on."""
        save_checkpoint(
            self._checkpoint_path,
            {
                "settings": self.settings.shaping(),
                "data": self.pictures.digest,
                "split": _split_digest(self.training, self.validation),
                "precision": str(self.runtime.precision),
                "epoch": self.epoch,
                "batch": self.batch,
                "running": self.running.state(),
                "network": self.network.state_dict(),
                "average": self.average.state_dict() if self.average is not None else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "history": self.history,
                "best": self.best,
            },
        )
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Go back to the state of the checkpoint, if there is one.

        Raises:
            UsageError: it belongs to a run with other settings, data or split, named one by one.
        """
        found = load_checkpoint(self._checkpoint_path)
        if found is None:
            return
        state, path = found
        told = {
            **{f"--{name}": (state["settings"].get(name), value) for name, value in self.settings.shaping().items()},
            "the pictures": (state["data"], self.pictures.digest),
            "the split": (state["split"], _split_digest(self.training, self.validation)),
            "the precision": (state["precision"], self.runtime.precision),
        }
        changed = [f"{name} was {then}, is {now}" for name, (then, now) in told.items() if then != now]
        if changed:
            raise UsageError(
                f"{path} is the checkpoint of another run: {'; '.join(changed)}. Repeat its settings to resume it,"
                " or remove it to start anew"
            )
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.running = Running(self.runtime.device, state["running"])
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.history, self.best = state["history"], state["best"]
        if self.best["state"] is not None:
            self._save_best(self.history[self.best["epoch"]])
        say(f"Resuming from {path}: epoch {self.epoch + 1}, batch {self.batch} of {len(self.batches)}")

    @property
    def _checkpoint_path(self) -> Path:
        return self.settings.run_folder / "checkpoint.pt"

    def _stop(self, reason: str) -> int:
        self.save()
        say(f"Stopped by {reason} in epoch {self.epoch + 1}, batch {self.batch}; the same command goes on from here.")
        return CHECKPOINTED

    def _checkpoint_is_due(self) -> bool:
        epochs, _ = self.settings.checkpoint_interval
        return bool(epochs) and self.epoch % epochs == 0

    def _minutes_are_over(self) -> bool:
        _, seconds = self.settings.checkpoint_interval
        return bool(seconds) and time.monotonic() - self._saved_at >= seconds

    # ---------------------------------------------------------------------------------------- details

    def _thaw(self) -> None:
        """Let the backbone learn or hold it still, batch norm included, as --freeze says for this epoch."""
        freeze = self.settings.freeze
        frozen = freeze == "backbone" or (freeze.isdecimal() and self.epoch < int(freeze))
        for parameter in self._backbone:
            parameter.requires_grad_(not frozen)
        self.network.train()
        if frozen:
            for name, module in self.network.named_modules():
                if isinstance(module, nn.BatchNorm2d) and not name.startswith(self.architecture.head):
                    module.eval()

    def _candidate(self) -> nn.Module:
        """The network that is validated and kept: the running average where one is kept."""
        return self.average.module if self.average is not None else self.network

    def _gave_up(self) -> bool:
        patience = self.settings.early_stop
        given_up = bool(patience) and self.epoch - 1 - self.best["epoch"] >= patience
        if given_up:
            say(f"No better validation loss for {patience} epochs: stopping early.")
        return given_up

    def _announce(self) -> None:
        count = sum(p.numel() for p in self.network.parameters())
        say(
            f"{self.settings.conv_net}: {count:,} parameters, weights from {self.origin}, on {self.runtime}; training"
            f" on {len(self.training)} pictures, validating on {len(self.validation)}: {', '.join(self.spec.labels)}"
        )
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(("path", "label", "split"))
        for part, samples in (("train", self.training), ("validation", self.validation)):
            writer.writerows((s.id, self.spec.labels[s.label], part) for s in samples)
        write_text(self.settings.run_folder / "split.csv", rows.getvalue())

    def _write_metrics(self, seconds: float) -> None:
        folder = self.settings.run_folder
        # rewritten whole from the history: after a resume the curve continues and never forks
        write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.history))
        # times are no part of the result and stay out of it
        with open(folder / "timing.jsonl", "a", encoding="utf-8") as file:
            waited = self._waited_s / max(seconds, 1e-9)
            rate = self.running.count / max(seconds, 1e-9)
            row = {"epoch": self.epoch + 1, "seconds": seconds, "images_per_s": rate, "data_wait_share": waited}
            file.write(json.dumps(row) + "\n")
        plot_curves(self.history, folder / "curves.png", f"{self.settings.conv_net}, {len(self.training)} pictures")

    def _card(self, metrics: dict[str, Any]) -> ModelCard:
        settings = self.settings
        return ModelCard(
            spec=self.spec,
            weights_sha256="",
            data={
                "name": self.pictures.root.name,
                "layout": self.pictures.layout,
                "digest": self.pictures.digest,
                "train": self.pictures.counts(self.training),
                "validation": self.pictures.counts(self.validation),
                "rejected": len(self.pictures.rejected),
            },
            training={**settings.shaping(), "started_from": self.origin, "best_epoch": self.best["epoch"] + 1},
            metrics=metrics,
            provenance=provenance(),
        )


def _look_at(settings: Settings, architecture: Architecture) -> PictureSet:
    pictures = find_pictures(Path(settings.data_dir))
    with Bar("Checking pictures", len(pictures.samples)) as bar:
        pictures = inspect(pictures, architecture.preprocess, settings.on_bad, lambda done, _: bar.step(done))
    if pictures.rejected:
        say(f"{len(pictures.rejected)} files are not used:")
        for id_, reason in pictures.rejected[:10]:
            say(f"  {id_}: {reason}")
        if len(pictures.rejected) > 10:
            say(f"  and {len(pictures.rejected) - 10} more")
    counts = ", ".join(f"{count} {name}" for name, count in pictures.counts().items())
    say(f"{len(pictures.samples)} pictures in {pictures.root}: {counts}")
    return pictures


def _spec(settings: Settings, architecture: Architecture, labels: tuple[str, ...]) -> ModelSpec:
    arch_args = {**architecture.arch_args, "num_classes": len(labels), "dropout": settings.dropout}
    return ModelSpec(
        name=settings.conv_net,
        arch=architecture.arch,
        labels=labels,
        arch_args=arch_args,
        preprocess=architecture.preprocess,
    )


def _split_digest(training: list[Sample], validation: list[Sample]) -> str:
    lines = [f"{part}\t{s.id}\n" for part, samples in (("t", training), ("v", validation)) for s in samples]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _told(measured: dict[str, Any], epochs: int, seconds: float, waited_s: float) -> str:
    parts = [
        f"Epoch {measured['epoch']}/{epochs}",
        f"Loss/train {measured['train_loss']:.4f}  Acc/train {measured['train_accuracy']:.4f}",
    ]
    if "validation_loss" in measured:
        parts.append(f"Loss/valid {measured['validation_loss']:.4f}  Acc/valid {measured['validation_accuracy']:.4f}")
    rate = measured["train_count"] / max(seconds, 1e-9)
    parts.append(f"{seconds:.1f} s, {rate:.1f} images/s, {100 * waited_s / max(seconds, 1e-9):.0f} % waiting for data")
    return " | ".join(parts)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
