"""One training run, from a folder of pictures to weights with their card, stopped and resumed without a trace.

The path is short: find and inspect the pictures, split them, build the network, then for each epoch train, validate,
keep the best. Everything that the result depends on is in the settings or in the checkpoint; see marten.streams.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from marten.alone import alone
from marten.architectures import find_architecture
from marten.batches import Batch, Batches, Pictures
from marten.best import Best
from marten.checkpoint import load_checkpoint, paths_of, save_checkpoint
from marten.devices import Runtime, choose_runtime
from marten.distributed import ALONE, World, exit_code, find_world, joined
from marten.errors import CHECKPOINTED, DONE, DataError, TrainingError, UsageError
from marten.files import write_text
from marten.interrupt import REASONS, Interrupt
from marten.learner import Learner
from marten.material import find_material
from marten.metrics import Running, wilson_interval
from marten.objectives import MEASURES
from marten.progress import Bar, console, say
from marten.provenance import provenance
from marten.runlog import Pace, epoch_line, write_metrics, write_rates
from marten.settings import Settings
from marten.tracking import Tracked, Trackers
from marten.weighing import weigh

History = list[dict[str, Any]]


def train(settings: Settings) -> int:
    """Train, or go on training, as the settings say; writes the weights, the card and the run folder.

    Returns:
        0 when the run is finished, 85 when its state is saved and it wishes to be started again.

    Raises:
        MartenError: data, weights, device or settings that cannot be trained with.
    """
    interrupt = Interrupt(settings.max_runtime_s, patient=False)
    world = find_world()
    console.quiet = not world.is_first
    with joined(world, choose_runtime(settings.device, world=world).device.type), contextlib.ExitStack() as held:
        world.first(lambda: held.enter_context(alone(settings.run_folder)))
        return _train(Run(settings, world), interrupt)


def _train(run: Run, interrupt: Interrupt) -> int:
    try:
        run.resume()
        interrupt.patient = True
        code = run.go_on(interrupt)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{run.settings.batch_size} pictures at once do not fit into {run.runtime}: try a smaller --batch_size"
        ) from error
    finally:
        run.batches.close()
        run.held_out.close()
    run.world.largest(0)  # nobody leaves before all is written: a launcher ends the others when one is gone
    return exit_code(code, run.world)


class Run:
    """A run in progress: what learns, what it learns from, what it has to show, and where it stands.

    Several processes make one run of the same result: each learns from its share of every batch, and the first one
    alone looks at the pictures, speaks and writes. What they decide (to stop, to save) they decide together.

    Args:
        settings: of the run.
        world: the processes; all see the same data, below their own --data_dir.

    Raises:
        MartenError: as `train`.
    """

    def __init__(self, settings: Settings, world: World = ALONE) -> None:
        self.settings = settings
        self.world = world
        self.architecture = find_architecture(settings.conv_net)
        if settings.batch_size < world.size:
            raise UsageError(f"--batch_size {settings.batch_size} cannot be shared by {world.size} processes")
        self._found = world.first(lambda: load_checkpoint(self._checkpoint_path))
        before = self._found[0] if self._found else {}
        # what was begun in one number format goes on in it, whatever another machine's "auto" would choose
        precision = before.get("precision", "auto") if settings.precision == "auto" else settings.precision
        own = choose_runtime(settings.device, precision, world)
        self.runtime = replace(own, precision=world.first(lambda: own.precision))
        self.material = material = find_material(settings, self.architecture, world)
        self._measure = MEASURES[material.spec.task]
        self.learner = Learner(settings, self.architecture, material.spec, self.runtime, before.get("origin"), world)
        workers = settings.num_workers if settings.num_workers >= 0 else min(8, world.cpus)
        pre = material.spec.preprocess
        pin = self.runtime.device.type == "cuda"
        weighed = weigh(material.training, settings.weigh) if settings.weigh else material.training
        pictures = Pictures(weighed, pre, settings.augment, settings.seed)
        loading: dict[str, Any] = {"workers": workers, "pin": pin, "world": world}
        self.batches = Batches(pictures, settings.batch_size, shuffle=True, **loading)
        held_out = Pictures(material.validation, pre)
        self.held_out = Batches(held_out, settings.batch_size, shuffle=False, **loading)

        self.epoch = 0
        self.batch = 0
        self.running = Running(self.runtime.device)
        self.history: History = []
        self.rates: list[tuple[float, float]] = []
        self._tracked = Tracked(settings.run_folder, settings.weights_path.stem, settings.shaping())
        self._trackers = Trackers((), self._tracked, ())
        self.best = Best(settings, material, self.learner.origin, world.is_first)
        self._reason, self._is_due = "", False
        self._resumed_from: list[Path] = []
        self._saved_at = time.monotonic()
        self._pace = Pace()
        provenance()  # notes the commit now

    # ------------------------------------------------------------------------------------------ the run

    def go_on(self, interrupt: Interrupt) -> int:
        """Run to the end or to the next stop; returns 0 or 85.

        Raises:
            UsageError: a tracker is not installed.
            TrainingError: a loss that is no number, a picture that went away.
        """
        settings = self.settings
        self._announce()
        self._trackers = Trackers(settings.track if self.world.is_first else (), self._tracked, self.history)
        code = CHECKPOINTED
        try:
            code = self._go_on(interrupt)
        finally:
            self._trackers.close(finished=code == DONE)
        return code

    def _go_on(self, interrupt: Interrupt) -> int:
        settings = self.settings
        while self.epoch < settings.epochs and not self._gave_up():
            if not (self._train_epoch(interrupt) and self._finish_epoch(interrupt)):
                return self._stop(self._reason)
            if self.epoch < settings.epochs and self._checkpoint_is_due():
                self.save()
                if settings.self_checkpoint:
                    return self._stop("--self_checkpoint")
            if self.epoch < settings.epochs and self._must_stop(interrupt):
                return self._stop(self._reason)
        self._finish()
        return DONE

    def _train_epoch(self, interrupt: Interrupt) -> bool:
        """Train from `self.batch` to the end of the epoch; False when interrupted, the state being whole."""
        self.learner.begin_epoch(self.epoch)
        steps = len(self.batches)
        self._pace = pace = Pace()
        started = time.monotonic()
        batches = self.batches.epoch(self.epoch, self.batch)
        with Bar(f"Epoch {self.epoch + 1}/{self.settings.epochs}", steps) as bar:
            while self.batch < steps:
                waiting = time.monotonic()
                pixels_NHWC, labels_N, whole = self._next(batches)
                pace.waited_s += time.monotonic() - waiting
                step, last = self.epoch * steps + self.batch, self.settings.epochs * steps
                self.learner.learn(pixels_NHWC, labels_N, whole, step, last, self.running)
                self.rates.append(self.learner.rates)
                self.batch += 1
                pace.count += whole
                seen, note = self.running, ""
                if bar.wants_note():  # making one waits for the GPU
                    note = f"loss {seen.loss:.4f}  {self._measure} {seen.accuracy:.4f}"
                bar.step(self.batch, note)
                is_due = self._minutes_are_over()
                if is_due and self.settings.self_checkpoint:
                    interrupt.ask("--self_checkpoint")
                if self._must_stop(interrupt, is_due):
                    return False
                if self._is_due:
                    self.save()
        pace.seconds = time.monotonic() - started
        return True

    def _finish_epoch(self, interrupt: Interrupt) -> bool:
        """Validate, keep the best, write the metrics; the run then stands at the start of the next epoch.

        False when interrupted on the way: the state is then that of the epoch's last batch.
        """
        seen = self.running.together(self.world)
        measured: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": (self.epoch + 1) * len(self.batches),
            "lr": self.learner.lr,
            "train_loss": seen.loss,
            f"train_{self._measure}": seen.accuracy,
            "train_count": seen.count,
        }
        if self.material.validation:
            with Bar("Validating", len(self.held_out)) as bar:
                batches = bar.over(self.held_out.epoch(self.epoch))
                stop = partial(self._must_stop, interrupt)
                held_out = self.learner.judge(self.learner.candidate, batches, self.runtime, stop)
            if held_out is None:
                return False
            measured |= {
                "validation_loss": held_out.loss,
                f"validation_{self._measure}": held_out.accuracy,
                "validation_count": held_out.count,
            }
        judged = measured.get("validation_loss", measured["train_loss"])
        if not math.isfinite(judged) or not math.isfinite(measured["train_loss"]):
            raise TrainingError(
                f"the loss is {judged} after epoch {self.epoch + 1}: try a lower --lr or --precision fp32"
            )
        self.history.append(measured)
        say(epoch_line(measured, self.settings.epochs, self._pace))
        self.best.offer(self.learner.candidate, measured, judged)
        if self.world.is_first:
            title = f"{self.settings.conv_net}, {len(self.material.training)} pictures"
            write_metrics(self.settings.run_folder, self.history, self._pace, title)
            write_rates(self.settings.run_folder, self.rates)
        self._trackers.tell(self.history)
        self.epoch += 1
        self.batch = 0
        self.running = Running(self.runtime.device)
        return True

    def _finish(self) -> None:
        """Judge the best weights once more as the server will run them, in fp32, and tell how it went."""
        if self.material.validation:
            network = self.learner.network
            assert self.best.weights is not None
            network.load_state_dict(self.best.weights)
            exact = Runtime(self.runtime.device, "fp32")
            served = self.learner.judge(network, self.held_out.epoch(self.epoch), exact)
            assert served is not None  # nothing may stop it
            chosen = self.history[self.best.epoch]
            self.best.write(chosen | {"validation_loss": served.loss, f"validation_{self._measure}": served.accuracy})
            interval = ""
            if self._measure == "accuracy":
                low, high = wilson_interval(round(served.accuracy * served.count), served.count)
                interval = f" [{low:.4f}, {high:.4f}]"
            say(
                f"Best epoch {self.best.epoch + 1}: validation {self._measure} {served.accuracy:.4f}{interval}"
                f" on {served.count} pictures, loss {served.loss:.4f}"
            )
        for path in {*paths_of(self._checkpoint_path), *self._resumed_from} if self.world.is_first else ():
            path.unlink(missing_ok=True)
        say(f"End of training. Model at {self.settings.weights_path}, curves at {self.settings.run_folder}/curves.png")

    # -------------------------------------------------------------------------------------- the state

    def save(self) -> None:
        """Write the checkpoint. The first process writes for all, and nobody goes on, or away, before it has."""
        state = self._state()
        if self.world.is_first:
            save_checkpoint(self._checkpoint_path, state)
        self.world.largest(0)
        self._saved_at = time.monotonic()

    def _state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "settings": self.settings.shaping(),
            "data": self.material.pictures.digest,
            "split": self.material.split_digest,
            "precision": str(self.runtime.precision),
            "origin": self.learner.origin,
            "epoch": self.epoch,
            "batch": self.batch,
            "running": self.running.together(self.world).state(),
            "shares": self.world.gather(self.running.state()),
            **self.learner.state(),
            "history": self.history,
            "rates": torch.tensor(self.rates, dtype=torch.float64),
            "tracked": self._tracked.ids,
            "best": self.best.state(),
        }

    def resume(self) -> None:
        """Go back to the state of the checkpoint, if there is one.

        Raises:
            UsageError: it belongs to a run with other settings, data or split, named one by one.
        """
        if self._found is None:
            return
        state, path = self._found
        self._found, self._resumed_from = None, [path]
        usual = Settings().shaping()  # of a setting that is younger than the checkpoint
        then = {name: state["settings"].get(name, usual[name]) for name in usual}
        told = {
            **{f"--{name}": (then[name], value) for name, value in self.settings.shaping().items()},
            "the pictures": (state["data"], self.material.pictures.digest),
            "the split": (state["split"], self.material.split_digest),
            "the precision": (state["precision"], self.runtime.precision),
        }
        changed = [f"{name} was {then}, is {now}" for name, (then, now) in told.items() if then != now]
        if changed:
            raise UsageError(
                f"{path} is the checkpoint of another run: {'; '.join(changed)}. Repeat its settings to resume it,"
                " or remove it to start anew"
            )
        self.epoch, self.batch = state["epoch"], state["batch"]
        shares = state.get("shares", [state["running"]])
        if len(shares) == self.world.size:
            self.running = Running(self.runtime.device, shares[self.world.rank])
        else:
            self.running = Running(self.runtime.device, state["running"] if self.world.is_first else None)
            say(
                f"{path} was written by {len(shares)} processes, and now there are {self.world.size}: the same pictures"
                f" in the same order, but sums are rounded otherwise{self._what_else_differs()}"
            )
        self.learner.load_state(state)
        self.history = state["history"]
        self.best.load_state(state["best"])
        self.rates = [(head, backbone) for head, backbone in state["rates"].tolist()]
        self._tracked.ids.update(state["tracked"])
        if self.best.weights is not None:
            self.best.write(self.history[self.best.epoch])
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
        return self.world.is_first and bool(seconds) and time.monotonic() - self._saved_at >= seconds

    # ------------------------------------------------------------------------------------ of one mind

    def _must_stop(self, interrupt: Interrupt, is_due: bool = False) -> bool:
        """Whether to stop now, and whether to save: what any process has reason for, all do."""
        number, due = self.world.largest(REASONS.index(interrupt.reason), int(is_due))
        self._reason, self._is_due = REASONS[number], bool(due)
        return bool(number)

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; where one process cannot get its share, all save the state and end."""
        batch, error = None, None
        try:
            batch = next(batches)
        except (DataError, RuntimeError) as found:  # the latter where a loader process was killed
            error = found
        (failed,) = self.world.largest(int(batch is None))
        if failed:
            self.save()
            reason = str(error).partition("\n")[0] if error else "another process could not get its pictures"
            raise TrainingError(f"{reason}. The state is saved: the same command goes on from here") from error
        assert batch is not None
        return batch

    def _what_else_differs(self) -> str:
        """What of a run, besides the rounding of sums, depends on how many processes there are."""
        settings, is_cpu = self.settings, self.runtime.device.type == "cpu"
        told = {
            "dropout leaves other units out": settings.dropout > 0 and not is_cpu,
            "batch norm sees other shares": settings.batch_norm == "own",
            f"--mix {settings.mix} pairs within other shares": settings.mix != "none",
        }
        return "".join(f", {words}" for words, holds in told.items() if holds)

    # ---------------------------------------------------------------------------------------- details

    def _gave_up(self) -> bool:
        patience = self.settings.early_stop
        given_up = bool(patience) and self.epoch - 1 - self.best.epoch >= patience
        if given_up:
            say(f"No better validation loss for {patience} epochs: stopping early.")
        return given_up

    def _announce(self) -> None:
        count = sum(p.numel() for p in self.learner.network.parameters())
        say(
            f"{self.settings.conv_net}: {count:,} parameters, weights from {self.learner.origin}, on {self.runtime};"
            f" training on {len(self.material.training)} pictures, validating on {len(self.material.validation)}"
        )
        if self.best.weights is None and self.settings.weights_path.exists():
            say(f"{self.settings.weights_path} is there already: the first epoch replaces it.")
        alone = self.material.alone
        if alone and self.settings.validation_split:
            some = ", ".join(alone[:5]) + (" and others" if len(alone) > 5 else "")
            say(f"Not validated, as they have one picture only: {some}. All of them are trained on.")
        if self.world.size > 1:
            each = f"{self.settings.batch_size / self.world.size:g}"
            say(f"{self.world.size} processes, each with {each} pictures of every batch of {self.settings.batch_size}")
        if self.world.is_first:
            write_text(self.settings.run_folder / "split.csv", self.material.split_table)
