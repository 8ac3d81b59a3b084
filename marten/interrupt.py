"""When a run must stop: a scheduler's signal or the end of the time it was given."""

from __future__ import annotations

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupt:
    """Notes SIGTERM, SIGUSR1 and SIGINT instead of dying of them; asked between batches.

    Args:
        max_runtime_s: seconds from now after which a stop is due; 0 for never.
    """

    def __init__(self, max_runtime_s: float = 0.0) -> None:
        self._deadline = time.monotonic() + max_runtime_s if max_runtime_s else None
        self._signal: signal.Signals | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is signal.SIGINT:
            raise KeyboardInterrupt  # asked twice from the keyboard: do not wait for the batch
        self._signal = signal.Signals(number)

    @property
    def reason(self) -> str:
        """Why to stop now, in a word; empty to go on."""
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "--max_runtime"
        return ""
