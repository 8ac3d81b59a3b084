"""Cut single cells out of their images: every cell, or a balanced and seeded sample for training."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marten.cells.config import Config
from marten.cells.crops import label_regions, normalise, take_crops, take_masks, to_strips
from marten.cells.errors import CellsError
from marten.cells.images import encode_png, read_channels, read_plane
from marten.cells.index import Index, Site, read_index
from marten.cells.locations import Centres, location_text, read_locations, site_centres, view_px
from marten.cells.parallel import ordered_map
from marten.cells.project import Project
from marten.cells.store import INDEX, TABLE, CropRow, IndexWriter, crop_name, encode_strip, write_table

SITES_PER_SHARD = 16
"""About 50 MB a shard with 80 cells a site, five channels and boxes of 128 pixels."""
FORMATS = ("png", "shards")


@dataclass
class ExportReport:
    """What an export did, for the person who ran it.

    Attributes:
        sites: read; crops: written; folder: where to.
        no_locations: sites without a file of locations, which count as empty.
        empty: sites whose file names no cell.
        doubles: cells left out because another of their site has the same centre, hence the same file name.
        problems: one line per site that could not be exported.
    """

    folder: Path
    sites: int = 0
    crops: int = 0
    no_locations: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    doubles: int = 0
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text."""
        told = [f"{self.crops} crops of {self.sites} sites in {self.folder}"]
        for what, sites in (("without a file of locations", self.no_locations), ("without a cell", self.empty)):
            if sites:
                told.append(f"{len(sites)} sites {what}: {', '.join(sites[:5])}{', …' if len(sites) > 5 else ''}")
        if self.doubles:
            told.append(f"{self.doubles} cells share the centre of another and were written once")
        return told + [f"failed: {problem}" for problem in self.problems]


@dataclass(frozen=True)
class _Task:
    """Sites that one process exports at one go."""

    config: Config
    folder: Path
    sites: list[Site]
    targets: list[int]
    split_field: str
    counts: list[int | None]
    seed: int
    geometry: str
    shard: str


@dataclass
class _Done:
    rows: list[CropRow] = field(default_factory=list)
    no_locations: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    doubles: int = 0
    problems: list[str] = field(default_factory=list)


def export_cells(
    project: Project,
    *,
    sample: bool = False,
    validation: bool = False,
    factor: float | None = None,
    seed: int = 0,
    kind: str = "png",
    geometry: str = "parity",
    workers: int = 1,
    overwrite: bool = False,
    part: int | None = None,
) -> ExportReport:
    """Write crops and their sc-metadata.csv.

    Args:
        project: whose cells.
        sample: only training sites, balanced over classes, a share of each site's cells; otherwise every cell.
        validation: add to a sample the validation sites, every cell of them.
        factor: that share of the median number of cells per site; None takes train.sampling.factor.
        seed: of the sample. The same seed gives the same cells, whatever the number of processes.
        kind: "png", the tree that DeepProfiler writes, or "shards".
        geometry: "parity" or "slice", see marten.cells.crops.
        workers: processes.
        overwrite: replace crops that are already there.
        part: of the index, see `split`.

    Returns:
        What was done. Sites that cannot be read are told in it, and the rest is written.

    Raises:
        CellsError: the tables are unusable, crops are already there, or not a single crop came out.
    """
    if kind not in FORMATS:
        raise CellsError(f"no store of the kind {kind!r}: choose one of {', '.join(FORMATS)}")
    index = read_index(project, part)
    folder = project.crops
    _make_room(folder, overwrite)
    chosen: list[tuple[Site, int | None]] = [(site, None) for site in index.sites]
    if sample:
        share = project.config["train.sampling.factor"] if factor is None else factor
        chosen = sample_sites(project.config, index, float(share), seed)
        if validation:
            chosen += [(site, None) for site in index.having(project.config["train.partition.validation"])]
    report = ExportReport(folder, sites=len(chosen))
    tasks = _tasks(project.config, index, folder, chosen, seed, geometry, kind)
    with ExitStack() as stack:
        writer = None
        if kind == "shards":
            box = int(project.config["dataset.locations.box_size"])
            masked = project.config.uses_outlines
            writer = stack.enter_context(IndexWriter(folder / INDEX, box, project.config.channels, masked))
        rows = _collect(ordered_map(_export, tasks, workers), report, writer)
        report.crops = write_table(folder / TABLE, rows, index.target, index.split_field)
    if not report.crops:
        raise CellsError("not a single crop came out: " + "; ".join(report.lines()[1:] or ["no site has a cell"]))
    return report


def sample_sites(config: Config, index: Index, factor: float, seed: int) -> list[tuple[Site, int | None]]:
    """Draw the sites of a balanced training sample, and how many cells to take from each.

    Every class gives as many sites as the median class has, a smaller class some of its sites twice; from each draw
    come max(1, factor x median cells per site) cells. Drawn twice, a site gives twice as many different cells.

    Returns:
        Sites in the order of the table with their number of cells.
    """
    sites = index.having(config["train.partition.training"])
    cells = [_count_cells(config, site) for site in sites]
    take = max(1, int(float(np.median(cells)) * factor))
    by_class: dict[int, list[int]] = {}
    for number, site in enumerate(sites):
        by_class.setdefault(index.class_of(site), []).append(number)
    per_class = int(np.median([len(members) for members in by_class.values()]))
    draws = np.zeros(len(sites), np.int64)
    rng = np.random.default_rng(seed)
    for _, members in sorted(by_class.items()):
        again = len(members) < per_class
        drawn = rng.permutation(members)[:per_class]
        if again:  # every site once before any comes twice
            drawn = np.concatenate([drawn, rng.choice(members, per_class - len(members))])
        np.add.at(draws, drawn, 1)
    return [(site, int(times) * take) for site, times in zip(sites, draws, strict=True) if times]


def _count_cells(config: Config, site: Site) -> int:
    if config["dataset.locations.mode"] == "full_image":
        return 1
    try:
        centres = read_locations(site.locations)
    except CellsError:  # told when the site itself is exported
        return 0
    return 0 if centres is None else len(centres)


def _make_room(folder: Path, overwrite: bool) -> None:
    """Never ask on a terminal that a batch job does not have: refuse, or clear."""
    if any((folder / name).exists() for name in (TABLE, INDEX)):
        if not overwrite:
            raise CellsError(f"{folder} already holds crops: add --overwrite, or another folder with --single_cells")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _tasks(
    config: Config,
    index: Index,
    folder: Path,
    chosen: Sequence[tuple[Site, int | None]],
    seed: int,
    geometry: str,
    kind: str,
) -> Iterator[_Task]:
    size = SITES_PER_SHARD if kind == "shards" else 1
    for start in range(0, len(chosen), size):
        some = chosen[start : start + size]
        yield _Task(
            config=config,
            folder=folder,
            sites=[site for site, _ in some],
            targets=[index.class_of(site) for site, _ in some],
            split_field=index.split_field,
            counts=[count for _, count in some],
            seed=seed,
            geometry=geometry,
            shard=f"crops-{start // size:05d}.shard" if kind == "shards" else "",
        )


def _collect(done: Iterator[_Done], report: ExportReport, writer: IndexWriter | None) -> Iterator[CropRow]:
    for one in done:
        report.no_locations += one.no_locations
        report.empty += one.empty
        report.doubles += one.doubles
        report.problems += one.problems
        for row in one.rows:
            yield row if writer is None else writer.add(row)


def _export(task: _Task) -> _Done:
    """Export some sites; runs in a worker process."""
    done = _Done()
    with ExitStack() as stack:
        shard: Any = stack.enter_context(open(task.folder / task.shard, "wb")) if task.shard else None
        for site, target, count in zip(task.sites, task.targets, task.counts, strict=True):
            try:
                _export_site(task, site, target, count, shard, done)
            except CellsError as error:
                done.problems.append(f"{site.key}: {error}")
    return done


def _export_site(task: _Task, site: Site, target: int, count: int | None, shard: Any, done: _Done) -> None:
    config = task.config
    if config["dataset.locations.mode"] == "single_cells" and not site.locations.is_file():
        done.no_locations.append(site.key)
        return
    size = (config["dataset.images.height"], config["dataset.images.width"])
    planes = read_channels(site.images, size)
    centres = site_centres(config, site, planes[0].shape)
    numbers = _distinct(centres)
    done.doubles += len(centres) - len(numbers)
    if not len(centres):
        done.empty.append(site.key)
        return
    if count is not None and count < len(numbers):
        rng = np.random.default_rng([task.seed, zlib.crc32(site.key.encode())])
        numbers = np.sort(rng.choice(numbers, count, replace=False))
    centres = centres[numbers]
    strips = cut_strips(config, site, planes, centres, task.geometry)
    folder = task.folder / site.key
    if shard is None:
        folder.mkdir(parents=True, exist_ok=True)
    label = str(site.row[config.target])
    split = str(site.row.get(task.split_field, ""))
    for number, strip, (x, y) in zip(numbers, strips, centres, strict=True):
        x_text, y_text = location_text(float(x)), location_text(float(y))
        name = crop_name(site.key, target, x_text, y_text)
        row = (int(number), x_text, y_text, site.key, target, label, split, name)
        if shard is None:
            (task.folder / name).write_bytes(encode_png(strip))
            done.rows.append(CropRow(*row))
        else:
            data = encode_strip(strip)
            done.rows.append(CropRow(*row, task.shard, shard.tell(), len(data), zlib.crc32(data)))
            shard.write(data)


def cut_strips(config: Config, site: Site, planes: Sequence[Any], centres: Centres, geometry: str = "parity") -> Any:
    """Strips of some cells of one site: normalised channels side by side, and the mask last when there are outlines.

    Raises:
        CellsError: outlines are asked for and this site has none, or its outline has another size.
    """
    box = int(config["dataset.locations.box_size"])
    masks = None
    if config.uses_outlines:
        masks = take_masks(label_regions(read_outline(site, planes[0].shape)), centres, box, geometry)
    crops_NCHW = take_crops(planes, centres, box, view_px(config), geometry)
    return to_strips(normalise(crops_NCHW), masks)


def read_outline(site: Site, size_px: tuple[int, ...]) -> Any:
    """Read the outline image of a site.

    Raises:
        CellsError: outlines.csv has no row for it, or its size is not that of the images.
    """
    if site.outline is None:
        raise CellsError(f"outlines.csv has no row for {site.key}: add it, or empty prepare.outlines")
    outline = read_plane(site.outline)
    if outline.shape != size_px:
        raise CellsError(f"{site.outline} is {outline.shape} pixels, the images of {site.key} {size_px}")
    return outline


def _distinct(centres: Centres) -> NDArray[np.intp]:
    """Numbers of the cells that are the first at their centre, in order."""
    return np.sort(np.unique(centres, axis=0, return_index=True)[1])
