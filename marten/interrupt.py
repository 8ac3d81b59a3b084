"""When a run must stop: a scheduler's signal or the end of the time it was given."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REASONS = ("", "--max_runtime", "--self_checkpoint", *(number.name for number in SIGNALS))
"""Every reason to stop, in a word; several processes agree on the last one in this order."""


class Interrupt:
    """Notes SIGTERM, SIGUSR1 and SIGINT instead of dying of them; asked between batches.

    Args:
        max_runtime_s: seconds from now after which a stop is due; 0 for never.
        patient: whether Ctrl-C waits for the batch in hand. Before the first batch there is nothing to save, and it
            may end the program at once; a second Ctrl-C always does.
    """

    def __init__(self, max_runtime_s: float = 0.0, patient: bool = True) -> None:
        self._deadline = time.monotonic() + max_runtime_s if max_runtime_s else None
        self._reason = ""
        self.patient = patient
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if not self.patient or self._reason == "SIGINT":
                raise KeyboardInterrupt
            with contextlib.suppress(OSError):  # written past Python's buffers, which may be in use just now
                os.write(2, b"\nStopping after the batch in hand; Ctrl-C once more ends at once, unsaved.\n")
        self._reason = signal.Signals(number).name

    def ask(self, reason: str) -> None:
        """Ask for a stop from within."""
        self._reason = self._reason or reason

    @property
    def reason(self) -> str:
        """Why to stop now, in a word; empty to go on."""
        if not self._reason and self._deadline is not None and time.monotonic() >= self._deadline:
            return "--max_runtime"
        return self._reason
