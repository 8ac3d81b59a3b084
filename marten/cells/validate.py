"""Find what would spoil a training or a profile before it starts: images, locations and crops, all in one pass.

Every finding is a line of checks/report.csv; missing_images.csv, missing_locs.csv, missing_crops.csv and
zero_crops.csv hold the lists that the DeepProfiler helpers made, under the same names and column titles.
"""

from __future__ import annotations

import csv
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from marten.cells.config import Config
from marten.cells.errors import CellsError
from marten.cells.export import read_outline
from marten.cells.images import decode_png, read_channels
from marten.cells.index import Site, read_index
from marten.cells.locations import X, Y, read_locations, view_px
from marten.cells.parallel import ordered_map
from marten.cells.project import Project
from marten.cells.store import INDEX, TABLE, decode_strip, read_table
from marten.files import replacing

CHUNK = 256
"""Crops that one process checks at one go."""
KEPT = "sc-metadata-before-prune.csv"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        where: "image", "location", "outline" or "crop".
        what: its kind, for instance "missing" or "black".
        name: the file, crop or site.
        told: the whole message.
    """

    where: str
    what: str
    name: str
    told: str


@dataclass
class CheckReport:
    """What a check found.

    Attributes:
        findings: all of them, sites first, then crops.
        sites, cells, crops: how many were looked at.
        seconds: that it took.
        pruned: crops taken out of the table.
    """

    findings: list[Finding] = field(default_factory=list)
    sites: int = 0
    cells: int = 0
    crops: int = 0
    seconds: float = 0.0
    pruned: int = 0

    @property
    def healthy(self) -> bool:
        """Whether the next step may go on: nothing was found, or only crops that were pruned."""
        return all(finding.where == "crop" for finding in self.findings) and (
            self.pruned > 0 or not any(finding.where == "crop" for finding in self.findings)
        )

    def lines(self) -> list[str]:
        """The report as text, kinds with their counts and first names."""
        told = [f"{self.sites} sites, {self.cells} cells, {self.crops} crops checked in {self.seconds:.1f} s"]
        kinds = Counter((finding.where, finding.what) for finding in self.findings)
        for (where, what), count in kinds.items():
            first = next(f.told for f in self.findings if (f.where, f.what) == (where, what))
            told.append(f"{where}s {what}: {count}, first {first}")
        if not self.findings:
            told.append("nothing is wrong")
        if self.pruned:
            told.append(f"{self.pruned} crops taken out of {TABLE}; the table before is {KEPT}")
        return told


def check_project(
    project: Project, *, inputs: bool = True, crops: bool | None = None, prune: bool = False, workers: int = 1
) -> CheckReport:
    """Check the sites of the index and the exported crops, and write what was found.

    Args:
        project: what is checked.
        inputs: look at images, locations and outlines.
        crops: look at the crops; None does so when there is a table of crops.
        prune: take bad crops out of sc-metadata.csv; the table as it was stays beside it.
        workers: processes.

    Returns:
        What was found; also in outputs/checks and beside the crops.

    Raises:
        CellsError: the table of sites, or that of the crops when they are asked for, cannot be read.
    """
    started = time.monotonic()
    report = CheckReport()
    if inputs:
        _check_inputs(project, report, workers)
    if crops or (crops is None and (project.crops / TABLE).is_file()):
        bad = _check_crops(project, report, workers)
        if prune and bad:
            report.pruned = _prune(project.crops / TABLE, bad)
    report.seconds = time.monotonic() - started
    _write_lists(project, report, inputs)
    return report


# ---------------------------------------------------------------------------------------------------------- inputs


def _check_inputs(project: Project, report: CheckReport, workers: int) -> None:
    index = read_index(project)
    tasks = ((project.config, site) for site in index.sites)
    for findings, cells in ordered_map(_check_site, tasks, workers):
        report.sites += 1
        report.cells += cells
        report.findings += findings


def _check_site(task: tuple[Config, Site]) -> tuple[list[Finding], int]:
    """Look at one site; runs in a worker process."""
    config, site = task
    found: list[Finding] = []
    missing = [path for path in site.images if not path.is_file()]
    found += [Finding("image", "missing", str(path), f"{path}") for path in missing]
    shape: tuple[int, ...] | None = None
    if not missing:
        try:
            size = (config["dataset.images.height"], config["dataset.images.width"])
            shape = read_channels(site.images, size)[0].shape
        except CellsError as error:
            found.append(Finding("image", "unusable", site.key, str(error)))
    if config["dataset.locations.mode"] == "full_image":
        return found, 0
    locations, cells = _check_locations(config, site, shape)
    found += locations
    if config.uses_outlines and shape is not None:
        try:
            read_outline(site, shape)
        except CellsError as error:
            found.append(Finding("outline", "unusable", site.key, str(error)))
    return found, cells


def _check_locations(config: Config, site: Site, shape: tuple[int, ...] | None) -> tuple[list[Finding], int]:
    path = str(site.locations)
    try:
        centres = read_locations(site.locations)
    except CellsError as error:
        return [Finding("location", "unusable", path, str(error))], 0
    if centres is None:
        return [Finding("location", "missing", path, f"{path} (site {site.key} counts as empty)")], 0
    if not len(centres):
        return [Finding("location", "empty", path, f"{path} names no cell")], 0
    found = []
    doubles = len(centres) - len(np.unique(centres, axis=0))
    if doubles:
        found.append(Finding("location", "duplicate", path, f"{path}: {doubles} cells share a centre with another"))
    if shape is not None:
        half = view_px(config) / 2
        size = np.array([shape[1], shape[0]])
        beyond = int(((centres + half <= 0) | (centres - half >= size)).any(axis=1).sum())
        outside = int(((centres < 0) | (centres >= size)).any(axis=1).sum())
        if outside:
            told = f"{path}: {outside} centres lie outside the image of {shape[1]} x {shape[0]}, {beyond} crops wholly"
            found.append(Finding("location", "outside", path, told))
    return found, len(centres)


# ----------------------------------------------------------------------------------------------------------- crops


def _check_crops(project: Project, report: CheckReport, workers: int) -> set[str]:
    """Check every crop of the table; returns the names of the bad ones."""
    hashes = array("q")
    bad: set[str] = set()
    for total, findings, seen in ordered_map(_check_chunk, _chunks(project), workers):
        report.crops += total
        report.findings += findings
        bad.update(finding.name for finding in findings)
        hashes.extend(seen)
    values, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    twice = set(values[counts > 1].tolist())
    if twice:
        report.findings += _duplicates(project.crops / TABLE, twice)
    return bad


def _duplicates(table: Path, twice: set[int]) -> list[Finding]:
    times = Counter(row["Image_Name"] for row in read_table(table) if _digest(row["Image_Name"]) in twice)
    return [
        Finding("crop", "duplicate", name, f"{name} stands {count} times in the table")
        for name, count in times.items()
        if count > 1
    ]


def _digest(name: str) -> int:
    """A number of 64 bits for a name, the same in every process."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _chunks(project: Project) -> Iterator[dict[str, Any]]:
    """Tasks for the workers: some rows each, with what they need to judge them."""
    config = project.config
    about = {
        "folder": project.crops,
        "box": int(config["dataset.locations.box_size"]),
        "channels": len(config.channels),
        "masks": config.uses_outlines,
        "masked": bool(config["dataset.locations.mask_objects"]),
    }
    places = _places(project.crops)
    rows: list[tuple[str, str, str, Any]] = []
    for row in read_table(project.crops / TABLE):
        rows.append((row["Image_Name"], row.get(X, ""), row.get(Y, ""), next(places, None) if places else None))
        if len(rows) == CHUNK:
            yield {**about, "rows": rows}
            rows = []
    if rows:
        yield {**about, "rows": rows}


def _places(folder: Path) -> Iterator[Any] | None:
    """Shard, offset, length and checksum of each crop in the order of the table; None for a PNG tree.

    A pruned table names fewer crops than the index: rows are matched by name.
    """
    if not (folder / INDEX).is_file():
        return None
    import pyarrow.parquet as parquet

    def places() -> Iterator[Any]:
        wanted = (row["Image_Name"] for row in read_table(folder / TABLE))
        name = next(wanted, None)
        for batch in parquet.ParquetFile(folder / INDEX).iter_batches(
            columns=["Image_Name", "Shard", "Offset", "Length", "Crc32"]
        ):
            for found, *place in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                while name == found:
                    yield place
                    name = next(wanted, None)

    return places()


def _check_chunk(task: dict[str, Any]) -> tuple[int, list[Finding], list[int]]:
    """Check some crops; runs in a worker process."""
    found = []
    for name, _, _, place in task["rows"]:
        what, told = _judge(task, name, place)
        if what:
            found.append(Finding("crop", what, name, f"{name}{': ' + told if told else ''}"))
    return len(task["rows"]), found, [_digest(name) for name, *_ in task["rows"]]


def _judge(task: dict[str, Any], name: str, place: Any) -> tuple[str, str]:
    """Name what is wrong with one crop; two empty texts when nothing is."""
    box, channels = task["box"], task["channels"]
    try:
        if place is None:
            data = (task["folder"] / name).read_bytes()
            if not data:
                return "damaged", "an empty file"
            strip = decode_png(data)
        else:
            shard, offset, length, crc32 = place
            with open(task["folder"] / shard, "rb") as file:
                file.seek(offset)
                strip = decode_strip(file.read(length), box, crc32)
    except OSError:
        return "missing", ""
    except CellsError as error:
        return "damaged", str(error)
    wanted = (box, box * (channels + task["masks"]))
    if strip.shape != wanted or strip.dtype != np.uint8:
        return "of a wrong shape", f"{strip.shape} of {strip.dtype}, not {wanted} of uint8"
    planes = strip.reshape(box, -1, box).transpose(1, 0, 2)
    if task["masked"] and not planes[channels].any():
        return "without a mask", "no pixel belongs to the cell"
    pixels = planes[:channels]
    if not pixels.any():
        return "black", ""
    flat = [number for number, plane in enumerate(pixels) if plane.min() == plane.max()]
    if flat:
        return "with a flat channel", f"channel {', '.join(str(number) for number in flat)} holds a single value"
    return "", ""


def _prune(table: Path, bad: set[str]) -> int:
    """Rewrite the table without bad crops and without repeated rows; returns how many rows went."""
    with open(table, encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file))
    if not table.with_name(KEPT).exists():
        shutil.copyfile(table, table.with_name(KEPT))
    gone = 0
    seen: set[int] = set()
    with replacing(table) as neighbour, open(neighbour, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        for row in read_table(table):
            name = row["Image_Name"]
            digest = _digest(name)
            if name in bad or digest in seen:
                gone += 1
                continue
            seen.add(digest)
            writer.writerow(row)
    return gone


# ----------------------------------------------------------------------------------------------------------- lists


def _write_lists(project: Project, report: CheckReport, inputs: bool) -> None:
    if inputs:
        _write_list(project.checks / "missing_images.csv", "missing_images", _names(report, "image", "missing"))
        missing = [*_names(report, "location", "missing"), *_names(report, "location", "empty")]
        _write_list(project.checks / "missing_locs.csv", "missing_locs", missing)
    if report.crops:
        _write_list(project.crops / "missing_crops.csv", "missing_crops", _names(report, "crop", "missing"))
        _write_list(project.crops / "zero_crops.csv", "zero_crops", _names(report, "crop", "black"))
    rows = ([finding.where, finding.what, finding.name, finding.told] for finding in report.findings)
    _write_rows(project.checks / "report.csv", ["where", "what", "name", "told"], rows)


def _names(report: CheckReport, where: str, what: str) -> list[str]:
    return [finding.name for finding in report.findings if (finding.where, finding.what) == (where, what)]


def _write_list(path: Path, title: str, names: Iterable[str]) -> None:
    _write_rows(path, [title], ([name] for name in names))


def _write_rows(path: Path, header: list[str], rows: Iterable[list[str]]) -> None:
    with replacing(path) as neighbour, open(neighbour, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
