"""Every error of Marten and every exit code, defined once."""

from __future__ import annotations

from collections.abc import Iterable

from modelspec import CardError, MartenError, PictureError

DONE = 0
FAILED = 1
MISUSED = 2
CHECKPOINTED = 85
"""The run saved its state and wishes to be started again (HTCondor's checkpoint_exit_code)."""
INTERRUPTED = 130
"""Ctrl-C, or SIGTERM to a program that saves nothing: a shell's 128 + SIGINT."""


def joint_code(codes: Iterable[int]) -> int:
    """The exit code of several runs: one that wishes to go on outweighs one that failed, and that a finished one."""
    seen = set(codes) - {DONE}
    return CHECKPOINTED if CHECKPOINTED in seen else FAILED if seen else DONE


class UsageError(MartenError):
    """A flag, a setting or a combination of them that cannot be meant; exit code 2."""


class DataError(MartenError):
    """The data set is missing, empty, of one class only, or holds what may not be there."""


class TrainingError(MartenError):
    """Training cannot begin or go on: weights out of reach, a loss that is no number."""


class ArchiveError(MartenError):
    """A .mar that TorchServe would not load, or that would answer otherwise than its model."""


class ServerError(MartenError):
    """TorchServe cannot start, answer or stop."""


__all__ = [
    "CHECKPOINTED",
    "DONE",
    "FAILED",
    "INTERRUPTED",
    "MISUSED",
    "ArchiveError",
    "CardError",
    "DataError",
    "MartenError",
    "PictureError",
    "ServerError",
    "TrainingError",
    "UsageError",
    "joint_code",
]
