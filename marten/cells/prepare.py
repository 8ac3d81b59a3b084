"""Even out the illumination of each plate and write its images as 8-bit PNG, from which crops are then taken.

Two passes over a plate. The first adds up reduced images and histograms; a median filter over their mean gives, per
channel, how brightly each place of the field is lit. The second divides by that, stretches each image between its
own 0.05 and 99.95 percentiles, the upper one bounded by the plate's 99.99, and writes 8 bits.

Source: Singh et al. 2014 (doi 10.1111/jmi.12178) for the correction; order and percentiles are DeepProfiler's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import skimage.filters
import skimage.morphology
import skimage.transform
from numpy.typing import NDArray

from marten.cells.config import Config
from marten.cells.errors import CellsError
from marten.cells.images import Plane, encode_png, read_channels
from marten.cells.index import Site, compressed_path, plain, read_index
from marten.cells.parallel import ordered_map
from marten.cells.project import Project
from marten.files import replacing

# untyped libraries
_filters: Any = skimage.filters
_morphology: Any = skimage.morphology
_transform: Any = skimage.transform

LOW, HIGH = 0.05, 99.95
"""Percentiles of an image between which it is stretched."""
PLATE_LOW, PLATE_HIGH = 0.0001, 0.9999
"""Shares of a plate's pixels below its reported lower and upper percentile."""
FLOOR = 2
"""Percentile of the illumination below which no place counts as darker."""


@dataclass
class PrepareReport:
    """What a preparation did: images written, images that were there already, and one line per failure."""

    plates: int = 0
    written: int = 0
    present: int = 0
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text."""
        told = [f"{self.plates} plates: {self.written} images written, {self.present} there already"]
        return told + [f"failed: {problem}" for problem in self.problems]


@dataclass(frozen=True)
class _Statistics:
    """Sums over some sites of a plate.

    Attributes:
        size_px: (height, width) of every image.
        thumb_CHW: sum of the reduced images.
        histogram: (channels, 2 ** bits) counts of pixels.
    """

    size_px: tuple[int, int]
    thumb_CHW: NDArray[np.float64]
    histogram: NDArray[np.int64]


@dataclass(frozen=True)
class _Job:
    """One site to be compressed."""

    config: Config
    site: Site
    outputs: tuple[Path, ...]
    statistics: Path
    is_control: bool


def prepare_images(project: Project, workers: int = 1, overwrite: bool = False) -> PrepareReport:
    """Correct and compress all plates of the index.

    Args:
        project: whose images; reads inputs/images, writes outputs/intensities and outputs/compressed.
        workers: processes.
        overwrite: do again what is done; else only what is missing, or was made with other settings, is done.

    Raises:
        CellsError: images of one plate differ in size, or two would be written to one file. Damaged images are told
            in the report.
    """
    index = read_index(project, raw_images=True)
    plates: dict[str, list[Site]] = {}
    for site in index.sites:
        plates.setdefault(site.plate, []).append(site)
    outputs = {site.key: _outputs(project, site) for site in index.sites}
    _refuse_clashes(outputs)
    report = PrepareReport(plates=len(plates))
    control = project.config["dataset.metadata.control_value"]
    for plate, sites in plates.items():
        path = project.intensities / plate / f"{plate}.npz"
        fresh = overwrite or not _is_current(path, _digest(project.config, sites))
        if fresh:
            _write_statistics(project.config, plate, sites, path, workers)
        todo = [site for site in sites if fresh or not all(out.is_file() for out in outputs[site.key])]
        report.present += sum(len(site.images) for site in sites) - sum(len(site.images) for site in todo)
        jobs = (
            _Job(project.config, site, outputs[site.key], path, plain(site.row[index.target]) == plain(control))
            for site in todo
        )
        controls: Any = 0
        for key, counts, problem in ordered_map(_compress, jobs, workers):
            if problem:
                report.problems.append(f"{key}: {problem}")
                continue
            report.written += len(outputs[key])
            controls = controls + counts
        if fresh and not np.isscalar(controls):
            _add_to_statistics(path, controls_distribution=controls)
    return report


def illumination_function(
    mean_image: NDArray[np.floating[Any]], size_px: tuple[int, int], median_filter_size: float
) -> NDArray[np.float64]:
    """How brightly each place of the field is lit, in units of its dim places; at least 1.

    Args:
        mean_image: reduced mean of one channel over a plate.
        size_px: (height, width) of the full image.
        median_filter_size: diameter of the filter, in pixels of the reduced image.
    """
    disk = _morphology.disk(median_filter_size / 2)
    smooth = _filters.median(mean_image.astype(np.uint16), disk)
    full = np.asarray(
        _transform.resize(smooth, size_px, mode="reflect", anti_aliasing=True, preserve_range=True), np.float64
    )
    floor = float(np.percentile(full, FLOOR))
    if floor <= 0:  # a black channel: nothing to correct
        return np.ones(size_px)
    return np.maximum(full, floor) / floor


def compress_plane(
    plane: Plane, illumination: NDArray[np.float64], ceiling: float, size_px: tuple[int, int]
) -> NDArray[np.uint8]:
    """Correct one image and bring it to 8 bits.

    Args:
        plane: raw image of (height, width).
        illumination: of `illumination_function`, of the same shape.
        ceiling: the plate's upper percentile, which bounds this image's.
        size_px: (height, width) of the result.
    """
    image = plane / illumination
    if size_px != plane.shape:
        image = _transform.resize(image, size_px, mode="reflect", anti_aliasing=True)
    low, high = np.percentile(image, (LOW, HIGH))
    high = min(high, ceiling)
    if high <= low:
        return np.zeros(size_px, np.uint8)
    image = np.clip(image, low, high)
    return np.asarray(np.rint((image - low) / (high - low) * 255), np.uint8)


def percentile_of(histogram: NDArray[np.int64], share: float) -> int:
    """The first value up to which more than `share` of all counted pixels lie."""
    total = histogram.sum()
    return int(np.argmax(np.cumsum(histogram / total) > share)) if total else 0


def _outputs(project: Project, site: Site) -> tuple[Path, ...]:
    return tuple(compressed_path(project, site.plate, str(site.row[name])) for name in project.config.channels)


def _refuse_clashes(outputs: dict[str, tuple[Path, ...]]) -> None:
    seen: dict[Path, str] = {}
    for key, paths in outputs.items():
        for path in paths:
            if path in seen:
                told = f"{seen[path]} and {key}" if seen[path] != key else f"two channels of {key}"
                raise CellsError(f"{told} would both be written to {path}: give their images different names")
            seen[path] = key


def _digest(config: Config, sites: Sequence[Site]) -> str:
    """Tells whether statistics on disk were made from these images with these settings."""
    settings = [config[key] for key in sorted(_SETTINGS)]
    names = [str(path) for site in sites for path in site.images]
    return hashlib.sha256(repr((settings, names)).encode()).hexdigest()


_SETTINGS = (
    "dataset.images.bits",
    "prepare.illumination_correction.down_scale_factor",
    "prepare.illumination_correction.median_filter_size",
    "prepare.compression.scaling_factor",
)


def _is_current(path: Path, digest: str) -> bool:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return str(stored["digest"]) == digest
    except (OSError, KeyError, ValueError, EOFError):
        return False


def _write_statistics(config: Config, plate: str, sites: Sequence[Site], path: Path, workers: int) -> None:
    total: _Statistics | None = None
    first = ""
    count = 0
    for key, found in ordered_map(_measure, ((config, site) for site in sites), workers):
        if isinstance(found, str):  # told again, and for good, when the site is compressed
            continue
        if total is None:
            total, first = found, key
        elif found.size_px != total.size_px:
            raise CellsError(
                f"plate {plate}: the images of {key} are {found.size_px[1]} x {found.size_px[0]} pixels, those of "
                f"{first} {total.size_px[1]} x {total.size_px[0]}. One illumination fits one size: name two plates"
            )
        else:
            np.add(total.thumb_CHW, found.thumb_CHW, out=total.thumb_CHW)
            np.add(total.histogram, found.histogram, out=total.histogram)
        count += 1
    if total is None:
        raise CellsError(f"plate {plate}: not one of its {len(sites)} sites can be read; see scripts/cells check")
    mean_CHW = total.thumb_CHW / count
    size = config["prepare.illumination_correction.median_filter_size"]
    values = np.arange(total.histogram.shape[1])
    arrays = {
        "digest": np.array(_digest(config, sites)),
        "channels": np.array(config.channels),
        "original_size": np.array([*total.size_px, len(config.channels)]),
        "histogram": total.histogram,
        "mean_image": mean_CHW.transpose(1, 2, 0),
        "mean_values": np.array([(h * values).sum() / h.sum() for h in total.histogram]),
        "lower_percentiles": np.array([percentile_of(h, PLATE_LOW) for h in total.histogram]),
        "upper_percentiles": np.array([percentile_of(h, PLATE_HIGH) for h in total.histogram]),
        "illum_correction_function": np.stack(
            [illumination_function(mean, total.size_px, float(size)) for mean in mean_CHW], axis=-1
        ),
    }
    _save(path, arrays)


def _add_to_statistics(path: Path, **more: Any) -> None:
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    _save(path, {**arrays, **more})


def _save(path: Path, arrays: dict[str, Any]) -> None:
    with replacing(path) as neighbour, open(neighbour, "wb") as file:
        np.savez_compressed(file, **arrays)


def _measure(task: tuple[Config, Site]) -> tuple[str, _Statistics | str]:
    """Measure one site; runs in a worker process. Gives the reason instead, when it cannot be read."""
    config, site = task
    try:
        planes = _read(config, site)
    except CellsError as error:
        return site.key, str(error)
    scale = config["prepare.illumination_correction.down_scale_factor"]
    height, width = planes[0].shape
    small = (max(1, round(height / scale)), max(1, round(width / scale)))
    thumbs = [
        _transform.resize(p.astype(np.float64), small, mode="reflect", anti_aliasing=True, preserve_range=True)
        for p in planes
    ]
    depth = 2 ** int(config["dataset.images.bits"])
    histogram = np.stack([np.bincount(p.astype(np.int64).ravel(), minlength=depth) for p in planes])
    return site.key, _Statistics((height, width), np.stack(thumbs), histogram)


def _read(config: Config, site: Site) -> list[Plane]:
    planes = read_channels(site.images, (config["dataset.images.height"], config["dataset.images.width"]))
    depth = 2 ** int(config["dataset.images.bits"])
    for path, plane in zip(site.images, planes, strict=True):
        if plane.max() >= depth or plane.min() < 0:
            raise CellsError(f"{path} holds values of {plane.min()} to {plane.max()}, beyond dataset.images.bits")
    return planes


_loaded: tuple[Path, int, dict[str, Any]] | None = None
"""The plate's statistics, read once per process."""


def _statistics_of(path: Path) -> dict[str, Any]:
    global _loaded
    stamp = path.stat().st_mtime_ns
    if _loaded is None or _loaded[:2] != (path, stamp):
        with np.load(path, allow_pickle=False) as stored:
            wanted = ("illum_correction_function", "upper_percentiles")
            _loaded = (path, stamp, {name: stored[name] for name in wanted})
    return _loaded[2]


def _compress(job: _Job) -> tuple[str, Any, str]:
    """Compress one site; runs in a worker process. Gives its key, its histogram as a control, and what failed."""
    try:
        planes = _read(job.config, job.site)
        stored = _statistics_of(job.statistics)
        factor = float(job.config["prepare.compression.scaling_factor"])
        counts = np.zeros((len(planes), 256), np.int64)
        for channel, (plane, output) in enumerate(zip(planes, job.outputs, strict=True)):
            illumination = stored["illum_correction_function"][:, :, channel]
            if illumination.shape != plane.shape:
                raise CellsError(f"{job.site.images[channel]} is {plane.shape} pixels, its plate {illumination.shape}")
            size = (int(factor * plane.shape[0]), int(factor * plane.shape[1]))
            pixels = compress_plane(plane, illumination, float(stored["upper_percentiles"][channel]), size)
            if job.is_control:
                counts[channel] = np.bincount(pixels.ravel(), minlength=256)
            output.parent.mkdir(parents=True, exist_ok=True)
            partial = output.with_name(f".{output.name}.{os.getpid()}")
            partial.write_bytes(encode_png(pixels))
            os.replace(partial, output)
    except CellsError as error:
        return job.site.key, None, str(error)
    return job.site.key, counts, ""
