"""What goes wrong in a single-cell project."""

from __future__ import annotations

from marten.errors import MartenError


class CellsError(MartenError):
    """A configuration, a table, an image or a crop that a profiling step cannot use."""


class ConfigError(CellsError):
    """A key of the configuration that is missing, misspelt, of the wrong kind or not to be honoured."""
