"""The table of sites: index.csv read as text, checked at the door, one `Site` per row."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marten.cells.errors import CellsError
from marten.cells.project import Project
from marten.files import replacing

PLATE, WELL, SITE = "Metadata_Plate", "Metadata_Well", "Metadata_Site"
_KEYS = (PLATE, WELL, SITE)


@dataclass(frozen=True)
class Site:
    """One field of view: a row of index.csv, with the files that belong to it.

    Attributes:
        row: the row, in the order of the table; whole columns of numbers as numbers.
        plate, well, site: as the table spells them, leading zeros and hyphens kept.
        images: one file per channel, in the order of the configuration.
        locations: the file of the cells' centres.
        outline: the outline image, or None.
    """

    row: dict[str, Any] = field(repr=False)
    plate: str
    well: str
    site: str
    images: tuple[Path, ...] = field(repr=False)
    locations: Path = field(repr=False)
    outline: Path | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """Plate/Well/Site, which names the site everywhere."""
        return f"{self.plate}/{self.well}/{self.site}"


@dataclass(frozen=True)
class Index:
    """All sites of a project, and what their classes are.

    Attributes:
        sites: in the order of the table.
        target: the column whose values are the classes.
        classes: its values, sorted; a class's number is its place here, whatever part of the table is in use.
        split_field: the column that says which site is for what.
        path: the table, for messages.
    """

    sites: list[Site]
    target: str
    classes: tuple[str, ...]
    split_field: str
    path: Path

    def class_of(self, site: Site) -> int:
        """Number of the class of a site."""
        return self.classes.index(str(site.row[self.target]))

    def having(self, values: Iterable[Any]) -> list[Site]:
        """The sites whose split is one of `values`; 0 and "0" and 0.0 are the same.

        Raises:
            CellsError: the table has no split column, or none of its rows holds such a value.
        """
        if self.sites and self.split_field not in self.sites[0].row:
            raise CellsError(f"{self.path} has no column {self.split_field!r} (train.partition.split_field)")
        wanted = {plain(v) for v in values}
        chosen = [site for site in self.sites if plain(site.row[self.split_field]) in wanted]
        if not chosen:
            found = Counter(plain(site.row[self.split_field]) for site in self.sites)
            raise CellsError(
                f"no row of {self.path} has {self.split_field} in {sorted(wanted)}; it holds {dict(found)}: "
                "set train.partition.training and .validation to its values"
            )
        return chosen


def plain(value: Any) -> str:
    """Text of a cell by which values are compared: 0, 0.0 and "0" are one value."""
    text = str(value).strip()
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else text


def read_index(project: Project, part: int | None = None, raw_images: bool = False) -> Index:
    """Read and check the table of sites.

    Args:
        project: whose table; its configuration names the columns.
        part: number of a part that `split` wrote, or None for the whole table. Classes are always those of the whole.
        raw_images: point to the microscope's images even when the configuration says that compressed ones are used.

    Raises:
        CellsError: a table or a column that is missing, a row that repeats another, an empty or impossible value.
    """
    whole = project.index_path
    header, rows = _read_table(whole)
    channels, target = project.config.channels, project.config.target
    _check_columns(whole, header, (*_KEYS, *channels, target))
    classes = tuple(sorted({row[target] for row in rows}))
    columns = {name: [row[name] for row in rows] for name in header}
    path = whole if part is None else part_path(project, part)
    if part is not None:
        part_header, rows = _read_table(path, may_be_empty=True)
        _check_columns(path, part_header, header)
    _check_rows(path, rows, (*_KEYS, *channels, target))
    outlines = _read_outlines(project) if project.config.uses_outlines else {}
    # kinds are those of the whole table: the tables of all parts must fit together
    kinds = {name: _kind(values) for name, values in columns.items()}
    typed = [{name: kinds[name](row[name]) for name in header} for row in rows]
    sites = []
    for row, types in zip(rows, typed, strict=True):
        plate, well, number = (row[name] for name in _KEYS)
        sites.append(
            Site(
                row=types,
                plate=plate,
                well=well,
                site=number,
                images=tuple(_image_path(project, plate, row[channel], raw_images) for channel in channels),
                locations=project.locations / plate / f"{well}-{number}-Nuclei.csv",
                outline=outlines.get((plate, well, number)),
            )
        )
    return Index(sites, target, classes, project.config["train.partition.split_field"], path)


def compressed_path(project: Project, plate: str, image: str) -> Path:
    """Where `prepare` puts the 8-bit version of an image: {Plate}/{name}.png, only the true extension exchanged."""
    name = Path(image.replace("\\", "/")).name
    suffixes = {".tif", ".tiff", ".png", "." + str(project.config["dataset.images.file_format"]).lower().lstrip(".")}
    stem = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in suffixes else name
    return project.compressed_images / plate / f"{stem}.png"


def split_index(project: Project, parts: int) -> list[Path]:
    """Write index-000.csv, index-001.csv, …: whole wells, nearly equal numbers of them, each site in exactly one part.

    Returns:
        The files written, exactly `parts`; with more parts than wells some hold a header alone.

    Raises:
        CellsError: `parts` is not positive, or the table is not to be read.
    """
    if parts < 1:
        raise CellsError(f"--parts must be at least 1, found {parts}")
    index = read_index(project)
    wells = sorted({(site.plate, site.well) for site in index.sites})
    header, rows = _read_table(project.index_path)
    written = []
    for number in range(parts):
        mine = set(wells[number * len(wells) // parts : (number + 1) * len(wells) // parts])
        path = part_path(project, number)
        _write_table(path, header, [row for row in rows if (row[PLATE], row[WELL]) in mine])
        written.append(path)
    return written


def part_path(project: Project, part: int) -> Path:
    """Path of one part of the table: index.csv gives index-007.csv."""
    return project.metadata / f"{project.index_path.stem}-{part:03d}{project.index_path.suffix}"


def _read_table(path: Path, may_be_empty: bool = False) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            lines = [line for line in reader if line]
    except OSError as error:
        raise CellsError(f"no table at {path} ({error.strerror}): one row per site, see docs/cells.md") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise CellsError(f"{path} is not a CSV table in UTF-8: {error}") from error
    if not header:
        raise CellsError(f"{path} is empty")
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise CellsError(f"{path} has two columns called {twice[0]!r}")
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise CellsError(f"{path}, row {number}: {len(line)} values for {len(header)} columns")
    if not lines and not may_be_empty:
        raise CellsError(f"{path} has a header and no rows")
    return header, [dict(zip(header, (value.strip() for value in line), strict=True)) for line in lines]


def _write_table(path: Path, header: Sequence[str], rows: Iterable[dict[str, str]]) -> None:
    with replacing(path) as neighbour, open(neighbour, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _check_columns(path: Path, header: Sequence[str], wanted: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in header]
    if missing:
        raise CellsError(f"{path} lacks the column {missing[0]!r}; it has {', '.join(header)}")


def _check_rows(path: Path, rows: Sequence[dict[str, str]], wanted: Sequence[str]) -> None:
    seen: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(rows, start=2):
        for name in wanted:
            if row[name] == "":
                raise CellsError(f"{path}, row {number}: {name} is empty")
        for name in _KEYS:
            if "/" in row[name] or "\\" in row[name] or row[name] in (".", ".."):
                raise CellsError(f"{path}, row {number}: {name} is {row[name]!r}, which cannot name a folder")
        key = tuple(row[name] for name in _KEYS)
        if key in seen:
            raise CellsError(f"{path}: rows {seen[key]} and {number} are both site {'/'.join(key)}")
        seen[key] = number


def _image_path(project: Project, plate: str, image: str, raw_images: bool) -> Path:
    if not raw_images and project.config["prepare.compression.implement"]:
        return compressed_path(project, plate, image)
    path = Path(image.replace("\\", "/"))
    return path if path.is_absolute() else project.raw_images / path


def _read_outlines(project: Project) -> dict[tuple[str, str, str], Path]:
    path = project.metadata / "outlines.csv"
    header, rows = _read_table(path)
    _check_columns(path, header, ("Outlines", *_KEYS))
    return {(row[PLATE], row[WELL], row[SITE]): project.outlines / row["Outlines"] for row in rows}


def _kind(values: Sequence[str]) -> Any:
    """What a whole column is: int or float, but "007", "NA" and mixed columns stay text."""
    for kind in (int, float):
        try:
            numbers = [kind(value) for value in values]
        except ValueError:
            continue
        if kind is int and any(str(number) != value for number, value in zip(numbers, values, strict=True)):
            return str
        if kind is float and any("n" in value.lower() for value in values):
            return str
        return kind
    return str
