"""Many runs of one training with other settings: which settings there are, and their lines of flags.

A sweep is a folder: runs.txt holds one line of flags per run (what every scheduler reads), model_<run>.pth and .run/
beside it are what the runs left. Nothing else is kept, so a sweep can be added to, repeated and resumed.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from marten.errors import UsageError
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


def append_run(folder: Path, line: str) -> None:
    """Add one line to runs.txt, unless it is there already."""
    with open(folder / RUNS, "a+", encoding="utf-8") as file:
        file.seek(0)
        if line + "\n" not in file.readlines():
            file.write(line + "\n")  # one short write at the end: lines of several processes stay whole
