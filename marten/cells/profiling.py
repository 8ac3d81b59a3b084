"""From crops to profiles: the features of every cell, in DeepProfiler's .npz files and in Parquet.

Sites are read by other processes while the network computes; batches are filled across sites. Sites go in groups,
always the same for the same table: a group's batches depend on nothing else, so that a run which was killed and
started again writes the same bits as one that was not. A group is finished when its Parquet file stands.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from marten.cells.config import Config
from marten.cells.crops import Crops, label_regions, normalise, take_crops, take_masks
from marten.cells.errors import CellsError
from marten.cells.export import read_outline
from marten.cells.feature_files import (
    about_features,
    claim,
    is_done,
    npz_path,
    site_metadata,
    table_path,
    write_npz,
    write_parquet,
)
from marten.cells.images import read_channels
from marten.cells.index import Site, read_index
from marten.cells.locations import Centres, read_locations, site_centres, view_px
from marten.cells.networks import Profiler, fuse, layer_output, repeat_channels, to_numpy
from marten.cells.parallel import ordered_map, usable_cpus
from marten.cells.project import Project
from marten.files import write_text

if TYPE_CHECKING:
    from marten.devices import Runtime

GROUP = 8
"""Sites whose cells share batches; what a killed run does again at most, times the processes."""
CPU_BATCH = 16
"""Crops a core takes at once: larger batches leave its cache, and their memory is fetched from the system each time."""
_Give = Callable[[Crops], NDArray[np.float32]]
STORES = ("both", "npz", "parquet")
ABOUT = "profile.json"


@dataclass
class ProfileReport:
    """What a profiling did.

    Attributes:
        engine: what computed.
        sites, cells: profiled now.
        present: sites that were done before.
        empty: sites without a cell; no file is written for them.
        seconds: that it took, without loading and converting the network.
        problems: one line per site that could not be read.
    """

    engine: str = ""
    sites: int = 0
    cells: int = 0
    present: int = 0
    empty: list[str] = field(default_factory=list)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text."""
        pace = self.cells / self.seconds if self.seconds else 0.0
        told = [
            f"{self.cells} cells of {self.sites} sites in {self.seconds:.1f} s ({pace:.0f} cells/s) by {self.engine}"
        ]
        if self.present:
            told.append(f"{self.present} sites were done before")
        if self.empty:
            told.append(f"{len(self.empty)} sites without a cell: {', '.join(self.empty[:5])}")
        return told + [f"failed: {problem}" for problem in self.problems]


@dataclass
class _Cut:
    """One site as a worker process hands it over."""

    site: Site
    centres: Centres
    crops_NCHW: Crops | None
    problem: str = ""


def profile_cells(
    project: Project,
    profiler: Profiler,
    runtime: Runtime,
    *,
    batch_size: int | None = None,
    geometry: str = "parity",
    store: str = "both",
    workers: int = 1,
    part: int | None = None,
    overwrite: bool = False,
) -> ProfileReport:
    """Profile every cell of the index.

    Args:
        project: whose cells; features go to outputs/EXP/features, and tables to outputs/EXP/features/cells.
        profiler: of `load_profiler`.
        runtime: device and precision; fp32 gives DeepProfiler's numbers to 1e-5. In bf16 on a processor OpenVINO
            computes, where it is installed and agrees.
        batch_size: crops; None takes profile.batch_size. On a processor at most 16, which is faster there.
        geometry: "parity" or "slice".
        store: "npz", "parquet" or "both".
        workers: processes that read and cut.
        part: of the index, see `split`; parts never write the same file.
        overwrite: do again what is done.

    Raises:
        CellsError: features of another network or other settings are already there.
    """
    if store not in STORES:
        raise CellsError(f"no store {store!r}: choose one of {', '.join(STORES)}")
    index = read_index(project, part)
    size = batch_size or int(project.config["profile.batch_size"])
    if runtime.device.type == "cpu":
        size = min(size, CPU_BATCH)
    network = fuse(profiler.network, profiler.layer)
    give, engine = _features(dataclasses.replace(profiler, network=network), runtime, project.config)
    about = about_features(project.config, profiler, runtime, geometry, size, engine)
    claim(project.features / ABOUT, about, overwrite)
    groups = [index.sites[start : start + GROUP] for start in range(0, len(index.sites), GROUP)]
    tables = [table_path(project, part, number) for number in range(len(groups))]
    report = ProfileReport(engine)
    todo = []
    for number, sites in enumerate(groups):
        if not overwrite and is_done(project, sites, tables[number], store):
            report.present += len(sites)
        else:
            todo.append(number)
    started = time.monotonic()
    tasks = ((project.config, site, geometry) for number in todo for site in groups[number])
    cuts = ordered_map(_cut, tasks, workers)
    with _side_by_side(runtime) as pool:
        before: Callable[[], None] | None = None
        for number in todo:
            arrived = [next(cuts) for _ in groups[number]]
            features = _start_group(give, arrived, size, pool)
            if before is not None:  # one group is written while the next is computed
                before()
            before = functools.partial(
                _write_group, project, profiler, arrived, features, tables[number], store, report
            )
        if before is not None:
            before()
    report.seconds = time.monotonic() - started
    return report


def _cut(task: tuple[Config, Site, str]) -> _Cut:
    """Read one site and cut its crops; runs in a worker process."""
    config, site, geometry = task
    try:
        return _cut_site(config, site, geometry)
    except CellsError as error:
        return _Cut(site, np.zeros((0, 2)), None, f"{site.key}: {error}")


def _cut_site(config: Config, site: Site, geometry: str) -> _Cut:
    if config["dataset.locations.mode"] == "single_cells":
        known = read_locations(site.locations)
        if known is None or not len(known):
            return _Cut(site, np.zeros((0, 2)), None)
    planes = read_channels(site.images, (config["dataset.images.height"], config["dataset.images.width"]))
    centres = site_centres(config, site, planes[0].shape)
    box = int(config["dataset.locations.box_size"])
    crops_NCHW = take_crops(planes, centres, box, view_px(config), geometry)
    if config["dataset.locations.mask_objects"]:
        regions = label_regions(read_outline(site, planes[0].shape))
        crops_NCHW *= take_masks(regions, centres, box, geometry)[:, None]
    return _Cut(site, centres, normalise(crops_NCHW))


def _features(profiler: Profiler, runtime: Runtime, config: Config) -> tuple[_Give, str]:
    """What turns a batch of crops into features, and the name of the engine that does it."""
    import torch

    from marten.cells.fast_network import openvino_features  # not above: processes that cut crops need no torch

    fast, told = None, "torch"
    if (runtime.device.type, runtime.precision) == ("cpu", "bf16"):
        box = int(config["dataset.locations.box_size"])
        channels, size_px = (3, profiler.size_px) if profiler.repeats else (len(config.channels), box)
        fast, told = openvino_features(profiler, channels, size_px, usable_cpus())
    network = profiler.network.to(runtime.device).to(memory_format=torch.channels_last)

    def give(batch: Crops) -> NDArray[np.float32]:
        crops_NCHW = torch.from_numpy(batch).to(runtime.device, non_blocking=True)
        with torch.inference_mode():
            if profiler.repeats:
                crops_NCHW = repeat_channels(crops_NCHW, profiler.size_px)
            if fast is not None:
                found = fast(crops_NCHW)
            else:
                with runtime.autocast():
                    shaped_NCHW = crops_NCHW.to(memory_format=torch.channels_last)
                    found = layer_output(network, shaped_NCHW, profiler.layer)
        return np.asarray(to_numpy(found).reshape(len(batch), -1))

    return give, told


def _start_group(
    give: _Give, cuts: list[_Cut], batch_size: int, pool: ThreadPoolExecutor | None
) -> Iterator[NDArray[np.float32]]:
    """Begin to compute the features of a group, batches running across its sites; gives them batch by batch."""
    batches = _batches(cuts, batch_size)
    return iter([give(batch) for batch in batches]) if pool is None else pool.map(give, batches)


@contextmanager
def _side_by_side(runtime: Runtime) -> Iterator[ThreadPoolExecutor | None]:
    """On a processor: threads that each compute a batch of their own with one core.

    Threads that share a batch wait for each other at every layer, and where another program holds one core for a
    moment all of them stand still: a fifth of the pace on a busy machine. One core per batch also gives the same bits
    whatever the number of cores.
    """
    import torch

    from marten.allocator import keep_freed_memory

    if runtime.device.type != "cpu":
        yield None
        return
    keep_freed_memory()
    with ThreadPoolExecutor(usable_cpus(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def _batches(cuts: list[_Cut], batch_size: int) -> Iterator[Crops]:
    waiting: list[Crops] = []
    count = 0
    for cut in cuts:
        start, total = 0, 0 if cut.crops_NCHW is None else len(cut.crops_NCHW)
        while start < total and cut.crops_NCHW is not None:
            piece = cut.crops_NCHW[start : start + batch_size - count]
            waiting.append(piece)
            count += len(piece)
            start += len(piece)
            if count == batch_size:
                yield np.concatenate(waiting)
                waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _write_group(
    project: Project,
    profiler: Profiler,
    cuts: list[_Cut],
    batches: Iterator[NDArray[np.float32]],
    table: Path,
    store: str,
    report: ProfileReport,
) -> None:
    """Write what a group gave, its table or its note last: that is what makes it finished."""
    parts = list(batches)
    features = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    start = 0
    rows: list[tuple[Site, Centres, NDArray[np.float32]]] = []
    failed = False
    for cut in cuts:
        if cut.problem:
            report.problems.append(cut.problem)
            failed = True
            continue
        count = len(cut.centres)
        if not count:
            report.empty.append(cut.site.key)
            continue
        mine = features[start : start + count]
        start += count
        rows.append((cut.site, cut.centres, mine))
        if store in ("both", "npz"):
            write_npz(npz_path(project, cut.site), site_metadata(project, cut.site, profiler), cut.centres, mine)
        report.sites += 1
        report.cells += count
    if failed:
        table.unlink(missing_ok=True)
        table.with_suffix(".done").unlink(missing_ok=True)
    elif rows and store != "npz":
        write_parquet(table, rows, profiler, project)
    else:  # nothing for a table: a note says that the group is finished
        write_text(table.with_suffix(".done"), "")
