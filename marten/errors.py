"""Every error of Marten and every exit code, defined once."""

from __future__ import annotations

from modelspec import CardError, MartenError, PictureError

DONE = 0
FAILED = 1
MISUSED = 2
CHECKPOINTED = 85
"""The run saved its state and wishes to be started again (HTCondor's checkpoint_exit_code)."""


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
    "MISUSED",
    "ArchiveError",
    "CardError",
    "DataError",
    "MartenError",
    "PictureError",
    "ServerError",
    "TrainingError",
    "UsageError",
]
