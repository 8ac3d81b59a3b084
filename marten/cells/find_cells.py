"""Where cells are, from what other programs know: label images of nuclei, or tables of CellProfiler."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import skimage.measure
from numpy.typing import NDArray

from marten.cells.errors import CellsError
from marten.cells.images import Plane, read_plane
from marten.cells.index import Site, plain, read_index
from marten.cells.locations import Centres, X, Y, location_text
from marten.cells.project import Project
from marten.files import write_text

SMALLEST = 50
"""Pixels below which a region is no nucleus but dust."""
_X_NAMES = ("Nuclei_Location_Center_X", "Location_Center_X", "AreaShape_Center_X", "Nuclei_AreaShape_Center_X")


@dataclass
class LocationsReport:
    """What was written: sites, cells, and sites for which nothing was found."""

    sites: int = 0
    cells: int = 0
    missing: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text."""
        told = [f"{self.cells} cells of {self.sites} sites"]
        if self.missing:
            told.append(f"nothing for {len(self.missing)} sites: {', '.join(self.missing[:5])}")
        return told


def locations_from_masks(project: Project, folder: Path, pattern: str, smallest: int = SMALLEST) -> LocationsReport:
    """Write the locations of all sites from images of their nuclei.

    Args:
        project: whose index names the sites.
        folder: of the images.
        pattern: path below it with {plate}, {well} and {site}, * for what varies.
        smallest: pixels of the smallest nucleus.

    Raises:
        CellsError: several images fit one site, or an image cannot be read.
    """
    report = LocationsReport()
    for site in read_index(project).sites:
        wanted = pattern.format(plate=site.plate, well=site.well, site=site.site)
        found = sorted(folder.glob(wanted))
        if len(found) > 1:
            raise CellsError(
                f"{len(found)} images in {folder} fit {wanted}, for instance {found[0].name}, {found[1].name}"
            )
        if not found:
            report.missing.append(site.key)
            continue
        _write(site, centres_of_mask(read_plane(found[0]), smallest), report)
    return report


def centres_of_mask(mask: Plane, smallest: int = SMALLEST) -> Centres:
    """Centres of the regions of an image, from top to bottom.

    Args:
        mask: (height, width): black and white, or one number per nucleus.
        smallest: pixels of the smallest region that counts.
    """
    values = np.unique(mask)
    regions: NDArray[np.int64] = mask.astype(np.int64)
    if len(values) <= 2:
        label = skimage.measure.label  # untyped
        regions = np.asarray(label(mask > values[0]), np.int64)  # type: ignore[no-untyped-call]
    kept = [r.centroid for r in skimage.measure.regionprops(regions) if r.area >= smallest]  # type: ignore[no-untyped-call]
    return np.array([[x, y] for y, x in sorted(kept)]).reshape(-1, 2)


def locations_from_table(project: Project, table: Path, columns: Sequence[str] | None = None) -> LocationsReport:
    """Write the locations of all sites from one table of nuclei, as CellProfiler exports it.

    Args:
        project: whose index names the sites.
        table: CSV with Metadata_Plate, Metadata_Well, Metadata_Site and the centres.
        columns: names of the X and Y columns; None takes the first known pair.

    Raises:
        CellsError: a column is missing, or a value is no number.
    """
    found: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    keys = ("Metadata_Plate", "Metadata_Well", "Metadata_Site")
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            x_name, y_name = columns or _known_columns(table, header)
            missing = [name for name in (*keys, x_name, y_name) if name not in header]
            if missing:
                raise CellsError(f"{table} lacks the column {missing[0]}; it has {', '.join(header[:12])}")
            for row in reader:
                place = (float(row[x_name]), float(row[y_name]))
                found.setdefault(tuple(plain(row[key]) for key in keys), []).append(place)
    except (OSError, UnicodeDecodeError) as error:
        raise CellsError(f"{table} cannot be read: {error}") from error
    except (ValueError, TypeError) as error:
        raise CellsError(f"{table}, row {reader.line_num}: {error}") from error
    report = LocationsReport()
    for site in read_index(project).sites:
        places = found.get((plain(site.plate), plain(site.well), plain(site.site)))
        if places is None:
            report.missing.append(site.key)
        else:
            _write(site, np.array(places), report)
    return report


def _known_columns(table: Path, header: Sequence[str]) -> tuple[str, str]:
    for name in _X_NAMES:
        if name in header:
            return name, name[:-1] + "Y"
    raise CellsError(f"{table} has none of {', '.join(_X_NAMES)}: name its columns with --columns X Y")


def _write(site: Site, centres: Centres, report: LocationsReport) -> None:
    """Write whole pixels, as DeepProfiler's files have them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([X, Y])
    writer.writerows([location_text(float(x)), location_text(float(y))] for x, y in np.rint(centres))
    write_text(site.locations, text.getvalue())
    report.sites += 1
    report.cells += len(centres)
