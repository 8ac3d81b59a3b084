"""From cells to wells: one profile per well out of the features of its cells, well after well.

Three ways. "median" and "mean" take all cells of a well at once, as pycytominer does; "site-then-well" takes the
median of each site and the mean of those, as DeepProfiler's authors do, so that every site counts alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marten.cells.errors import CellsError
from marten.cells.feature_files import npz_path
from marten.cells.index import PLATE, SITE, WELL, Site, read_index
from marten.cells.project import Project
from marten.cells.tables import constant_metadata, write_profiles

METHODS = ("median", "mean", "site-then-well")
LEVELS = {"site": (PLATE, WELL, SITE), "well": (PLATE, WELL)}
COUNT = "Metadata_Object_Count"


@dataclass
class AggregateReport:
    """What an aggregation did: the table's path, its rows, the cells behind them, and sites without features."""

    path: Path
    rows: int = 0
    features: int = 0
    cells: int = 0
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text."""
        told = [f"{self.rows} profiles of {self.features} features from {self.cells} cells in {self.path}"]
        if self.missing:
            told.append(f"{len(self.missing)} sites have no features: {', '.join(self.missing[:5])}")
        return told + [f"failed: {problem}" for problem in self.damaged]


def aggregate_cells(
    project: Project, level: str = "well", method: str = "median", output: Path | None = None
) -> AggregateReport:
    """Aggregate the features of this experiment; one well is in memory at a time.

    Args:
        project: whose features; reads outputs/EXP/features, .npz files or tables alike.
        level: "well" or "site".
        method: "median", "mean" or "site-then-well".
        output: table to write, .csv, .csv.gz or .parquet; None is outputs/EXP/profiles/{level}.csv.

    Returns:
        What was done; sites without features, which may be empty ones, are told in it.

    Raises:
        CellsError: an unknown word, no features at all, or features of different lengths.
    """
    import pandas as pd

    if level not in LEVELS:
        raise CellsError(f"no level {level!r}: choose one of {', '.join(LEVELS)}")
    if method not in METHODS:
        raise CellsError(f"no method {method!r}: choose one of {', '.join(METHODS)}")
    index = read_index(project)
    path = output or project.results / "profiles" / f"{level}.csv"
    report = AggregateReport(path)
    source = _Source(project)
    groups: dict[tuple[str, ...], list[Site]] = {}
    for site in index.sites:
        key = (site.plate, site.well, site.site)[: len(LEVELS[level])]
        groups.setdefault(key, []).append(site)
    profiles: list[NDArray[np.float64]] = []
    counts, described = [], []
    for sites in groups.values():
        found = [(site, values) for site, values in source.read(sites, report) if len(values)]
        if not found:
            continue
        profiles.append(combine([values for _, values in found], method))
        counts.append(sum(len(values) for _, values in found))
        described.append(found[0][0].key)
        if profiles[-1].shape != profiles[0].shape:
            lengths = f"{len(profiles[0])} features in {described[0]}, {len(profiles[-1])} in {described[-1]}"
            raise CellsError(f"{project.features} mixes the features of different networks: {lengths}")
    if not profiles:
        raise CellsError(f"no features in {project.features}: run scripts/cells profile")
    keys = {site.key: number for number, sites in enumerate(groups.values()) for site in sites}
    rows = pd.DataFrame([site.row for site in index.sites]).rename(columns=_titled)
    rows["_group"] = [keys[site.key] for site in index.sites]
    kept = [name for name in constant_metadata(rows, ["_group"]) if name not in ("_group", *_images(project))]
    metadata = rows.groupby("_group", sort=False)[kept].first()
    table = metadata.loc[[keys[key] for key in described]].reset_index(drop=True)
    table["Metadata_Model"] = source.model
    table[COUNT] = counts
    names = source.names or [f"{source.model}_{number}" for number in range(len(profiles[0]))]
    table = pd.concat([table, pd.DataFrame(np.stack(profiles), columns=names)], axis=1)
    write_profiles(path, table)
    report.rows, report.features, report.cells = len(table), len(names), sum(counts)
    return report


def combine(sites: Sequence[NDArray[Any]], method: str) -> NDArray[np.float64]:
    """One profile from the cells of some sites, each an array of (cells, features)."""
    if method == "site-then-well":
        return np.asarray(np.mean([np.median(values.astype(np.float64), axis=0) for values in sites], axis=0))
    cells = np.concatenate([np.asarray(values, np.float64) for values in sites])
    return np.asarray(np.median(cells, axis=0) if method == "median" else cells.mean(axis=0))


def _titled(name: str) -> str:
    return name if name.startswith("Metadata_") else f"Metadata_{name}"


def _images(project: Project) -> set[str]:
    return {_titled(channel) for channel in project.config.channels}


class _Source:
    """The features of sites, from .npz files or, where only tables were written, from those."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.model = str(project.config["train.model.name"])
        self.names: list[str] = []
        self._places: dict[str, list[tuple[Path, int, int]]] | None = None

    def read(self, sites: Sequence[Site], report: AggregateReport) -> Iterator[tuple[Site, NDArray[np.float32]]]:
        for site in sites:
            path = npz_path(self.project, site)
            older = path.parent.with_name(f"{site.well}_{site.site}.npz")
            path = older if older.is_file() and not path.is_file() else path
            try:
                if path.is_file():
                    yield site, _read_npz(path)
                    continue
            except CellsError as error:
                report.damaged.append(str(error))
                continue
            places = self._find(site)
            if not places:
                report.missing.append(site.key)
            for table, start, count in places:
                yield site, self._read_rows(table, start, count)

    def _find(self, site: Site) -> list[tuple[Path, int, int]]:
        if self._places is None:
            self._places = {}
            for table in sorted((self.project.features / "cells").glob("*.parquet")):
                for key, start, count in _runs(table):
                    self._places.setdefault(key, []).append((table, start, count))
        return self._places.get(site.key, [])

    def _read_rows(self, path: Path, start: int, count: int) -> NDArray[np.float32]:
        import pyarrow.parquet as parquet

        table = parquet.read_table(path)
        names = [name for name in table.column_names if not name.startswith("Metadata_")]
        self.names = names
        return np.asarray(table.select(names).slice(start, count).to_pandas().to_numpy(), np.float32)


def _runs(path: Path) -> Iterator[tuple[str, int, int]]:
    """Where the rows of each site lie in a table of cells."""
    import pyarrow.parquet as parquet

    columns = parquet.read_table(path, columns=[PLATE, WELL, SITE]) if parquet.read_metadata(path).num_rows else None
    if columns is None:
        return
    keys = ["/".join(str(value) for value in row.values()) for row in columns.to_pylist()]
    start = 0
    for number in range(1, len(keys) + 1):
        if number == len(keys) or keys[number] != keys[start]:
            yield keys[start], start, number - start
            start = number


def _read_npz(path: Path) -> NDArray[np.float32]:
    """Features of a site; the pickled metadata beside them is never opened."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            features = stored["features"]
    except (OSError, KeyError, ValueError, EOFError) as error:
        raise CellsError(f"{path} is damaged: profile again, it will be done anew") from error
    except Exception as error:  # zipfile's own errors on truncated files
        raise CellsError(f"{path} is damaged ({error}): profile again, it will be done anew") from error
    if features.ndim != 2:
        raise CellsError(f"{path} holds features of shape {features.shape}, not (cells, features)")
    return np.asarray(features)
