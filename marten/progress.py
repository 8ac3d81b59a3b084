"""What a run tells while it goes on: a bar on a terminal, a plain line now and then everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

console = Console(highlight=False, soft_wrap=True)
"""Quiet in all but the first process of a run that several share."""


def say(text: str) -> None:
    """Print one line, above the bar where there is one, at once even into a file."""
    if console.is_terminal or console.quiet:
        console.print(text, markup=False, emoji=False)
    else:
        print(text, flush=True)


class Bar:
    """Progress over a known number of steps: `with Bar("Epoch 1", 50) as bar: bar.step(10, "loss 0.61")`.

    Off a terminal it prints a line every `every_s` seconds, so that a cluster's log stays short and shows life.
    """

    def __init__(self, title: str, total: int, every_s: float = 30.0) -> None:
        self._title = title
        self._total = total
        self._every_s = every_s
        self._told = time.monotonic()
        self._rich: Progress | None = None
        if console.is_terminal and sys.stdout.isatty() and not console.quiet:
            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self._task = self._rich.add_task(title, total=total, note="")

    def __enter__(self) -> Bar:
        if self._rich:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich:
            self._rich.stop()

    def wants_note(self) -> bool:
        """Whether a note handed to `step` would be shown now: making one may wait for the GPU."""
        pause = 0.2 if self._rich else self._every_s
        return time.monotonic() - self._told >= pause

    def of(self, done: int, total: int) -> None:
        """Say that `done` of `total` steps are behind us, where the total is only known on the way."""
        self._total = total
        if self._rich:
            self._rich.update(self._task, total=total)
        self.step(done)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Go through items, one step each."""
        for done, item in enumerate(items, 1):
            yield item
            self.step(done)

    def step(self, done: int, note: str = "") -> None:
        """Say that `done` of the steps are behind us."""
        told = self.wants_note()
        if told:
            self._told = time.monotonic()
        if self._rich:
            self._rich.update(self._task, completed=done)
            if note:
                self._rich.update(self._task, note=note)
        elif told and done < self._total and not console.quiet:
            print(f"{self._title}: {done}/{self._total} {note}".rstrip(), flush=True)
