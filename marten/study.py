"""Optuna's way through a sweep: each run's settings from what the earlier ones came to, hopeless runs ended early."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marten.errors import CHECKPOINTED, DataError, UsageError, joint_code
from marten.streams import stream
from marten.sweep import Choices, Range, append_run, line_of
from marten.sweep_results import PRUNED, loss_of, read_history, state_of


def optimize(
    folder: Path, choices: Choices, count: int, seed: int, train: Callable[[str, Callable[[], bool]], int]
) -> int:
    """Let Optuna choose the settings of `count` further runs from what the earlier ones came to.

    Its journal lies in the folder: any number of processes, on any machines that see it, work on one study, and a
    stopped one goes on. A run that is worse than most at the same epoch is ended, and its checkpoint removed.

    Args:
        folder: of the sweep.
        choices: lists and ranges.
        count: runs of this process.
        seed: of the sampler.
        train: runs one line of flags, asking now and then whether to give up; returns the exit code.

    Returns:
        85 when a run was stopped and wishes to go on, else 1 when one failed, else 0.

    Raises:
        UsageError: Optuna is not installed.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise UsageError("--optuna needs Optuna: pip install -r requirements-sweep.txt") from None
    folder.mkdir(parents=True, exist_ok=True)
    codes: set[int] = set()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed run has told its reason itself
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / "journal.log"))),
        study_name="marten",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    )

    def one(trial: Any) -> float:
        # by the trial's number: processes that share the study would else all draw the same
        study.sampler = optuna.samplers.TPESampler(seed=stream(seed, "trial", trial.number) % 2**32)
        settings = {name: _suggested(trial, name, values) for name, values in choices.items()}
        # named by its settings: repeated after an interruption it finds its own checkpoint
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        line = line_of(folder, name, settings)
        append_run(folder, line)
        weights = folder / f"model_{name}.pth"
        run = weights.with_suffix(".run")
        if state_of(weights, read_history(weights)) == "finished":  # of few choices one comes again
            return min(map(loss_of, read_history(weights)))
        (run / PRUNED).unlink(missing_ok=True)
        given_up, told = False, 0

        def hopeless() -> bool:
            nonlocal given_up, told
            rows = read_history(weights)
            for row in rows[told:]:
                trial.report(loss_of(row), row["epoch"])
            told = len(rows)
            given_up = given_up or bool(trial.should_prune())
            return given_up

        code = train(line, hopeless)
        if given_up and code == CHECKPOINTED:
            for checkpoint in run.glob("checkpoint*.pt"):  # nobody goes on with it, and it is thrice the weights' size
                checkpoint.unlink()
            (run / PRUNED).touch()
            raise optuna.TrialPruned
        codes.add(code)
        if code == CHECKPOINTED:
            study.enqueue_trial(trial.params)
            study.stop()
            raise optuna.TrialPruned
        if code:
            raise DataError(f"run {name} failed (exit {code}): {line}")
        return min(map(loss_of, read_history(weights)))

    study.optimize(one, n_trials=count, catch=(DataError,))
    return joint_code(codes)


def _suggested(trial: Any, name: str, values: list[str] | Range) -> str:
    if not isinstance(values, Range):
        return str(trial.suggest_categorical(name, values))
    if values.whole:
        return str(trial.suggest_int(name, int(values.low), int(values.high), log=values.log))
    return f"{trial.suggest_float(name, values.low, values.high, log=values.log):.4g}"
