"""Where the cells of a site are: the CSV of nuclei centres, or a grid over the whole image."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marten.cells.config import Config
from marten.cells.errors import CellsError
from marten.cells.index import Site

X, Y = "Nuclei_Location_Center_X", "Nuclei_Location_Center_Y"
Centres = NDArray[np.float64]
"""Centres of shape (cells, 2): column X, then row Y, in pixels."""


def read_locations(path: Path) -> Centres | None:
    """Read the centres of one site's cells, in the order of the file; further columns are tolerated.

    Returns:
        float64 of shape (cells, 2), columns X and Y; None when there is no such file.

    Raises:
        CellsError: a column is missing, a value is no finite number, or the file is not a table.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in (X, Y) if name not in header]
            if missing:
                raise CellsError(f"{path} lacks the column {missing[0]}; it has {', '.join(header) or 'nothing'}")
            x, y = header.index(X), header.index(Y)
            centres = [_numbers(path, number, line, x, y) for number, line in enumerate(reader, start=2) if line]
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CellsError(f"{path} cannot be read as a CSV table: {error}") from error
    return np.array(centres, dtype=np.float64).reshape(-1, 2)


def site_centres(config: Config, site: Site, size_px: tuple[int, int]) -> Centres:
    """The centres of all crops of a site; none when its file of locations is missing, which `check` tells.

    In the mode "full_image" they are the middle of the image when one view spans it, else a regular grid.

    Args:
        config: says where crops are taken.
        site: whose cells.
        size_px: (height, width) of the image.
    """
    if config["dataset.locations.mode"] == "full_image":
        return grid_centres(size_px, view_px(config))
    centres = read_locations(site.locations)
    return np.zeros((0, 2)) if centres is None else centres


def view_px(config: Config) -> int:
    """Side, in image pixels, of what one crop shows: view_size in the mode "full_image", else box_size."""
    box = int(config["dataset.locations.box_size"])
    if config["dataset.locations.mode"] == "full_image":
        return int(config["dataset.locations.view_size"] or box)
    return box


def grid_centres(size_px: tuple[int, int], view: int) -> Centres:
    """Centres of a regular grid of views that covers an image of (height, width)."""
    height, width = size_px
    if view == width:
        return np.array([[width / 2, height / 2]])
    ys = np.linspace(view / 2, height - view / 2, math.ceil(height / view))
    xs = np.linspace(view / 2, width - view / 2, math.ceil(width / view))
    return np.array([[x, y] for y in ys for x in xs])


def location_text(value: float) -> str:
    """A coordinate as it stands in a crop's file name: 401, or 401.5."""
    return str(int(value)) if float(value).is_integer() else str(float(value))


def as_stored(centres: Centres) -> NDArray[Any]:
    """Centres as int64 when all are whole, as DeepProfiler stores them, else as float64."""
    return centres.astype(np.int64) if bool(np.all(centres == np.floor(centres))) else centres


def _numbers(path: Path, row: int, line: list[str], x: int, y: int) -> tuple[float, float]:
    try:
        values = (float(line[x]), float(line[y]))
    except (ValueError, IndexError) as error:
        raise CellsError(f"{path}, row {row}: a centre must be two numbers, found {','.join(line)!r}") from error
    if not all(math.isfinite(value) for value in values):
        raise CellsError(f"{path}, row {row}: the centre is ({line[x]}, {line[y]}): take that cell out of the file")
    return values
