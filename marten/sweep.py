"""Many runs of one training with other settings: their lines of flags, their table of results, and the best of them.

A sweep is a folder: runs.txt holds one line of flags per run (what every scheduler reads), model_<run>.pth and .run/
beside it are what the runs left. Nothing else is kept, so a sweep can be added to, repeated and resumed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import random
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marten.errors import CHECKPOINTED, DataError, UsageError
from marten.files import write_text

RUNS = "runs.txt"


@dataclass(frozen=True)
class Range:
    """Numbers to draw one setting from.

    Attributes:
        low: smallest.
        high: largest.
        log: whether equal factors are equally likely, and not equal steps.
        whole: whether only whole numbers are drawn.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, generator: random.Random) -> str:
        """One value, as a flag takes it."""
        if self.log:
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = generator.uniform(self.low, self.high)
        return str(round(value)) if self.whole else f"{value:.4g}"


Choices = Mapping[str, "list[str] | Range"]


def read_choices(words: Sequence[str]) -> dict[str, list[str] | Range]:
    """Settings and their values, from words such as lr=1e-3,1e-4 or lr=1e-5..1e-2:log or epochs=5..20.

    Raises:
        UsageError: a word of another form.
    """
    choices: dict[str, list[str] | Range] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        match = re.fullmatch(r"([-+.\deE]+?)\.\.([-+.\deE]+?)(:log)?", text)
        if not name or not equals or not text or name in choices:
            raise UsageError(f"{word!r}: a setting once, as lr=1e-3,1e-4 or lr=1e-5..1e-2:log")
        if match is None:
            choices[name] = text.split(",")
            continue
        try:
            low, high = float(match[1]), float(match[2])
        except ValueError:
            raise UsageError(f"{word!r}: {match[1]}..{match[2]} are no numbers") from None
        if not low < high or (match[3] and low <= 0):
            raise UsageError(f"{word!r}: a range goes from a smaller to a larger number, above 0 with :log")
        whole = match[1].lstrip("-").isdecimal() and match[2].lstrip("-").isdecimal()
        choices[name] = Range(low, high, bool(match[3]), whole)
    if not choices:
        raise UsageError("give settings to vary, for instance lr=1e-3,1e-4 augment=flip,standard")
    return choices


def grid(choices: Choices) -> list[dict[str, str]]:
    """Every combination, the last setting changing fastest.

    Raises:
        UsageError: a range, which has no end of values.
    """
    lists: dict[str, list[str]] = {}
    for name, values in choices.items():
        if isinstance(values, Range):
            raise UsageError(f"{name}: a range has no end of values, draw from it with --random or --optuna")
        lists[name] = values
    return [dict(zip(lists, combination, strict=True)) for combination in itertools.product(*lists.values())]


def drawn(choices: Choices, count: int, seed: int) -> list[dict[str, str]]:
    """`count` random combinations; the first ones stay the same when `count` grows."""
    generator = random.Random(seed)
    return [
        {name: v.draw(generator) if isinstance(v, Range) else generator.choice(v) for name, v in choices.items()}
        for _ in range(count)
    ]


def line_of(folder: Path, name: str, settings: Mapping[str, str]) -> str:
    """The line of runs.txt for one run."""
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return " ".join([*words, "--model_path", str(folder / f"model_{name}.pth")])


def write_runs(folder: Path, trials: Sequence[Mapping[str, str]]) -> Path:
    """Write runs.txt of a sweep; returns its path.

    Raises:
        UsageError: another sweep is in the folder, or a blank in a value or in the folder's name.
    """
    if re.search(r"\s", f"{folder}{''.join(value for trial in trials for value in trial.values())}"):
        raise UsageError(f"no blank may be in the folder {folder} or in a value: runs.txt is split at blanks")
    width = len(str(len(trials)))
    text = "".join(line_of(folder, f"{i:0{width}}", trial) + "\n" for i, trial in enumerate(trials, 1))
    path = folder / RUNS
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UsageError(f"{path} is another sweep: give another --folder, or remove it")
    write_text(path, text)
    return path


@dataclass(frozen=True)
class Result:
    """What one run has come to.

    Attributes:
        name: of the run.
        weights: its state dict.
        settings: what it was given, beside what all were given.
        epochs: behind it.
        best: the row of metrics.jsonl with the lowest validation loss; empty before the first epoch.
        finished: whether it ended; else it runs, waits or was stopped.
    """

    name: str
    weights: Path
    settings: dict[str, str]
    epochs: int
    best: dict[str, Any]
    finished: bool

    @property
    def loss(self) -> float:
        """What runs are compared by; infinite before the first epoch."""
        return _loss(self.best) if self.best else math.inf


def results(folder: Path) -> list[Result]:
    """All runs of a sweep, the best first.

    Raises:
        DataError: no sweep in the folder.
    """
    path = folder / RUNS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for line in lines:
        words = shlex.split(line)
        given = dict(zip((w.lstrip("-") for w in words[::2]), words[1::2], strict=True))
        weights = folder / Path(given.pop("model_path")).name
        metrics = weights.with_suffix(".run") / "metrics.jsonl"
        rows = _rows(metrics)
        best = min(rows, key=_loss, default={})
        finished = bool(rows) and not (metrics.parent / "checkpoint.pt").exists() and _ended(weights, rows)
        name = weights.stem.removeprefix("model_")
        found.append(Result(name, weights, given, len(rows), best, finished))
    if not found:
        raise DataError(f"no sweep in {folder}: {RUNS} is missing or empty")
    return sorted(found, key=lambda result: result.loss)


def table(found: Sequence[Result]) -> str:
    """Results as .csv text, a column per setting."""
    keys = list(dict.fromkeys(key for result in found for key in result.settings))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *keys, "epochs", "best_epoch", "validation_accuracy", "validation_loss", "finished"])
    for r in found:
        told = [r.best.get("epoch", ""), r.best.get("validation_accuracy", ""), r.best.get("validation_loss", "")]
        values = [f"{v:.6g}" if isinstance(v, float) else v for v in told]
        writer.writerow(
            [r.name, *(r.settings.get(k, "") for k in keys), r.epochs, *values, "yes" if r.finished else "no"]
        )
    return text.getvalue()


def best_of(found: Sequence[Result]) -> Result:
    """The finished run with the lowest validation loss.

    Raises:
        DataError: none has finished.
    """
    done = [result for result in found if result.finished]
    if not done:
        raise DataError(f"none of the {len(found)} runs has finished yet")
    return done[0]


def optimize(
    folder: Path, choices: Choices, count: int, seed: int, train: Callable[[str, Callable[[], bool]], int]
) -> None:
    """Let Optuna choose the settings of `count` further runs from what the earlier ones came to.

    Its journal lies in the folder: any number of processes, on any machines that see it, work on one study, and a
    stopped one goes on. A run that is worse than most at the same epoch is ended.

    Args:
        folder: of the sweep.
        choices: lists and ranges.
        count: runs of this process.
        seed: of the sampler.
        train: runs one line of flags, asking now and then whether to give up; returns the exit code.

    Raises:
        UsageError: Optuna is not installed.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise UsageError("--optuna needs Optuna: pip install -r requirements-sweep.txt") from None
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed run has told its reason itself
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / "journal.log"))),
        study_name="marten",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    )

    def one(trial: Any) -> float:
        settings = {name: _suggested(trial, name, values) for name, values in choices.items()}
        # named by its settings: repeated after an interruption it finds its own checkpoint
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        line = line_of(folder, name, settings)
        _append_once(folder / RUNS, line)
        metrics = folder / f"model_{name}.run" / "metrics.jsonl"
        given_up, told = False, 0

        def hopeless() -> bool:
            nonlocal given_up, told
            rows = _rows(metrics)
            for row in rows[told:]:
                trial.report(_loss(row), row["epoch"])
            told = len(rows)
            given_up = given_up or bool(trial.should_prune())
            return given_up

        code = train(line, hopeless)
        if given_up and code:
            raise optuna.TrialPruned
        if code == CHECKPOINTED:
            study.enqueue_trial(trial.params)
            study.stop()
            raise optuna.TrialPruned
        if code:
            raise DataError(f"run {name} failed (exit {code}): {line}")
        return min(map(_loss, _rows(metrics)))

    study.optimize(one, n_trials=count, catch=(DataError,))


def _rows(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in metrics.read_text().splitlines()] if metrics.exists() else []


def _loss(row: Mapping[str, Any]) -> float:
    return float(row.get("validation_loss", row["train_loss"]))


def _ended(weights: Path, rows: list[dict[str, Any]]) -> bool:
    """Whether all epochs are behind a run, or it stopped early: a run in progress, or killed, has weights too."""
    card = weights.with_suffix(".json")
    if not weights.exists() or not card.exists():
        return False
    told = json.loads(card.read_text(encoding="utf-8"))["training"]
    patience = told.get("early_stop", 0)
    lowest = min(map(_loss, rows))
    best = max(number for number, row in enumerate(rows, 1) if _loss(row) == lowest)
    return bool(len(rows) >= told["epochs"] or 0 < patience <= len(rows) - best)


def _append_once(path: Path, line: str) -> None:
    with open(path, "a+", encoding="utf-8") as file:
        file.seek(0)
        if line + "\n" not in file.readlines():
            file.write(line + "\n")  # one short write at the end: lines of several processes stay whole


def _suggested(trial: Any, name: str, values: list[str] | Range) -> str:
    if not isinstance(values, Range):
        return str(trial.suggest_categorical(name, values))
    if values.whole:
        return str(trial.suggest_int(name, int(values.low), int(values.high), log=values.log))
    return f"{trial.suggest_float(name, values.low, values.high, log=values.log):.4g}"
