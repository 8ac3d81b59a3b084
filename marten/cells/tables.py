"""Tables of profiles: Metadata_* columns, then features; CSV that cytominer-style tools read, or Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marten.cells.errors import CellsError
from marten.files import replacing

Table = Any
"""A pandas DataFrame; pandas has no types of its own here."""


def read_profiles(path: Path) -> Table:
    """Read a table of profiles, .csv, .csv.gz or .parquet; "NA" and empty text stay text.

    Raises:
        CellsError: no such file, no table, no feature, or no row.
    """
    import pandas as pd

    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, keep_default_na=False, na_values={}, low_memory=False)
    except FileNotFoundError as error:
        raise CellsError(f"no table of profiles at {path}: it is written by the step before") from error
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise CellsError(f"{path} cannot be read as a table: {error}") from error
    features = feature_columns(table)
    if not features or not len(table):
        raise CellsError(f"{path} holds {len(table)} rows and {len(features)} features: nothing to work on")
    words = [name for name in features if table[name].dtype.kind not in "iuf"]
    for name in words:  # an empty cell makes a column text: it is a missing value
        try:
            table[name] = pd.to_numeric(table[name].replace("", np.nan))
        except ValueError as error:
            raise CellsError(
                f"{path}: the feature {name!r} holds text; metadata columns start with Metadata_"
            ) from error
    return table


def write_profiles(path: Path, table: Table) -> None:
    """Write a table of profiles in the format of its suffix."""
    with replacing(path) as neighbour:
        if path.suffix == ".parquet":
            table.to_parquet(neighbour, index=False)
        else:
            compression = "gzip" if path.suffix == ".gz" else None
            table.to_csv(neighbour, index=False, lineterminator="\n", compression=compression)


def feature_columns(table: Table) -> list[str]:
    """Names of the features: everything but Metadata_*, and never a place in the image."""
    return [name for name in table.columns if not str(name).startswith(("Metadata_", "Location_", "Nuclei_Location_"))]


def metadata_columns(table: Table) -> list[str]:
    """Names of the columns that describe a row."""
    features = set(feature_columns(table))
    return [name for name in table.columns if name not in features]


def find_column(table: Table, name: str, where: str) -> str:
    """The column called `name` or Metadata_`name`.

    Raises:
        CellsError: there is neither; lists the metadata columns.
    """
    for candidate in (name, f"Metadata_{name}"):
        if candidate in table.columns:
            return candidate
    raise CellsError(f"{where} has no column {name!r}; its metadata are {', '.join(metadata_columns(table))}")


def feature_matrix(table: Table, features: Sequence[str] | None = None) -> NDArray[np.float64]:
    """Features as float64 of shape (rows, features).

    Raises:
        CellsError: a value is missing or infinite, with its row and column.
    """
    names = list(features) if features is not None else feature_columns(table)
    values = np.asarray(table[names].to_numpy(), np.float64)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise CellsError(f"the profile in row {row + 2} has no number for {names[column]} ({len(bad)} such values)")
    return values


def constant_metadata(table: Table, by: Sequence[str]) -> list[str]:
    """Metadata columns that hold one value in every group of rows that are equal in `by`; `by` itself comes first."""
    others = [name for name in metadata_columns(table) if name not in by]
    counts = table.groupby(list(by), dropna=False, sort=False)[others].nunique(dropna=False)
    return [*by, *(name for name in others if bool((counts[name] <= 1).all()))]
