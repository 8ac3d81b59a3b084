"""Features on disk: DeepProfiler's .npz per site, tables in Parquet, and whether they are there and whole."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from marten.cells.config import Config
from marten.cells.errors import CellsError
from marten.cells.index import Site
from marten.cells.locations import Centres, X, Y, as_stored, read_locations
from marten.cells.networks import Profiler
from marten.cells.project import Project
from marten.files import replacing, write_text

if TYPE_CHECKING:
    from marten.devices import Runtime


def about_features(
    config: Config, profiler: Profiler, runtime: Runtime, geometry: str, batch_size: int, engine: str = "torch"
) -> dict[str, Any]:
    """What the features depend on."""
    engines = {} if engine.startswith("torch") else {"engine": engine}  # torch's were written without a name
    keys = ["dataset.images.channels", "dataset.locations.mode", "dataset.locations.box_size"]
    keys += ["dataset.locations.view_size", "dataset.locations.mask_objects", "prepare.compression.implement"]
    return {
        "weights": profiler.origin,
        "layer": profiler.layer,
        "model": profiler.name,
        "labels": list(profiler.labels),
        "imagenet_size_px": profiler.size_px if profiler.repeats else None,
        "device": runtime.device.type,
        "precision": runtime.precision,
        "geometry": geometry,
        "batch_size": batch_size,
        **engines,
        **{key: config[key] for key in keys},
    }


def claim(path: Path, about: dict[str, Any], overwrite: bool) -> None:
    """Refuse to mix features of different networks or settings in one folder."""
    if path.is_file() and not overwrite:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CellsError(f"{path} is damaged: profile again with --overwrite") from error
        changed = [
            f"{key} was {before.get(key)!r}, is {about[key]!r}" for key in about if before.get(key) != about[key]
        ]
        if changed:
            raise CellsError(
                f"{path.parent} holds other features: {'; '.join(changed)}. Add --overwrite, or another --exp"
            )
        return
    write_text(path, json.dumps(about, indent=2) + "\n")


def is_done(project: Project, sites: list[Site], table: Path, store: str) -> bool:
    """Whether every file of a group is there and whole; a truncated file is not done."""
    wants_npz = store in ("both", "npz")
    noted = table.with_suffix(".done").is_file()
    if not noted and (store == "npz" or not is_whole_parquet(table)):
        return False
    if not wants_npz:
        return True
    for site in sites:
        if project.config["dataset.locations.mode"] == "single_cells":
            try:
                centres = read_locations(site.locations)
            except CellsError:
                return False
            if centres is None or not len(centres):
                continue
        if not is_whole_npz(npz_path(project, site)):
            return False
    return True


def is_whole_parquet(path: Path) -> bool:
    """Whether a table is there with its end, which is written last."""
    import pyarrow.parquet as parquet

    try:
        parquet.ParquetFile(path)
    except (OSError, ValueError):
        return False
    return True


def is_whole_npz(path: Path) -> bool:
    """Whether a site's file is there and its checksums hold."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None and "features.npy" in file.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def npz_path(project: Project, site: Site) -> Path:
    """Where the features of a site go: features/{Plate}/{Well}/{Site}.npz."""
    return project.features / site.plate / site.well / f"{site.site}.npz"


def table_path(project: Project, part: int | None, number: int) -> Path:
    """Where the table of a group goes; parts of the index never share one."""
    whose = "" if part is None else f"part{part:03d}-"
    return project.features / "cells" / f"cells-{whose}{number:05d}.parquet"


def site_metadata(project: Project, site: Site, profiler: Profiler) -> dict[str, Any]:
    """The row of the index as DeepProfiler stores it: names of the images that were read, and the model."""
    row = dict(site.row)
    if project.config["prepare.compression.implement"]:
        for channel, path in zip(project.config.channels, site.images, strict=True):
            row[channel] = str(path.relative_to(project.compressed_images))
    return {**row, "Metadata_Model": profiler.name}


def write_npz(path: Path, metadata: dict[str, Any], centres: Centres, features: NDArray[np.float32]) -> None:
    """Write the features of a site as DeepProfiler does, its metadata a pickled dict."""
    with replacing(path) as neighbour, open(neighbour, "wb") as file:
        boxed = np.array(metadata, dtype=object)
        np.savez_compressed(file, features=features, metadata=boxed, locations=as_stored(centres))


def write_parquet(
    path: Path, rows: list[tuple[Site, Centres, NDArray[np.float32]]], profiler: Profiler, project: Project
) -> None:
    """Write the cells of a group: Metadata_* columns, then one column per feature. No programs inside, unlike .npz."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    columns: dict[str, Any] = {}
    metadata = [site_metadata(project, site, profiler) for site, _, _ in rows]
    counts = [len(values) for _, _, values in rows]
    for name in metadata[0]:
        title = name if name.startswith("Metadata_") else f"Metadata_{name}"
        values = [row[name] for row in metadata]
        columns[title] = arrow.array([v for v, count in zip(values, counts, strict=True) for _ in range(count)])
    centres = np.concatenate([centres for _, centres, _ in rows])
    columns["Metadata_ObjectNumber"] = np.concatenate([np.arange(count) for count in counts])
    # under Metadata_, so that no step takes a place in the image for a feature
    columns[f"Metadata_{X}"], columns[f"Metadata_{Y}"] = as_stored(centres).T
    features = np.concatenate([values for _, _, values in rows])
    names = feature_names(profiler, features.shape[1])
    columns |= {name: np.ascontiguousarray(features[:, i]) for i, name in enumerate(names)}
    with replacing(path) as neighbour:
        parquet.write_table(arrow.table(columns), neighbour, compression="zstd")


def feature_names(profiler: Profiler, count: int) -> list[str]:
    """Titles of the feature columns: the model and a number, or the classes when the profile is their probability."""
    if len(profiler.labels) == count:
        return [f"{profiler.name}_probability_{label}" for label in profiler.labels]
    return [f"{profiler.name}_{number}" for number in range(count)]
