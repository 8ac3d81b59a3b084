"""Crops on disk: a tree of PNG files as DeepProfiler writes it, or a few shards with one Parquet index.

Millions of small files are what a cluster's file system bears worst. A shard holds the crops of some sites one after
another; crops.parquet tells of each its shard, place and checksum. Both kinds come with sc-metadata.csv.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from marten.cells.errors import CellsError
from marten.cells.images import decode_png
from marten.cells.locations import X, Y
from marten.files import replacing

TABLE = "sc-metadata.csv"
INDEX = "crops.parquet"
CODEC = "zstd-delta"
"""Each row's differences from left to right, modulo 256, then Zstandard."""

Strip = NDArray[np.uint8]
"""One crop, its channels side by side: (box, box * channels)."""


@dataclass(frozen=True)
class CropRow:
    """One crop of sc-metadata.csv.

    Attributes:
        number: place of the cell in the locations of its site.
        x, y: centre in pixels, as text.
        key: Plate/Well/Site.
        target: number of its class.
        label, split: what the table of sites says in the target and split columns.
        image_name: path below the folder of crops, or its name in the index.
        shard, offset, length, crc32: where its bytes lie; shard is empty in a PNG tree.
    """

    number: int
    x: str
    y: str
    key: str
    target: int
    label: str
    split: str
    image_name: str
    shard: str = ""
    offset: int = 0
    length: int = 0
    crc32: int = 0


def crop_name(key: str, target: int, x: str, y: str) -> str:
    """Path of a crop below the folder of crops: {Plate}/{Well}/{Site}/{Target}@{X}x{Y}.png."""
    return f"{key}/{target}@{x}x{y}.png"


def encode_strip(strip: Strip) -> bytes:
    """Compress a strip for a shard, losslessly."""
    delta = np.empty_like(strip)
    delta[:, 0] = strip[:, 0]
    np.subtract(strip[:, 1:], strip[:, :-1], out=delta[:, 1:])
    return bytes(imagecodecs.zstd_encode(delta.tobytes(), level=1))


def decode_strip(data: bytes, box: int, crc32: int | None = None) -> Strip:
    """Undo `encode_strip`.

    Raises:
        CellsError: the bytes are damaged.
    """
    if crc32 is not None and zlib.crc32(data) != crc32:
        raise CellsError("its bytes in the shard are damaged (checksum)")
    try:
        flat = np.frombuffer(imagecodecs.zstd_decode(data), np.uint8)
        return np.cumsum(flat.reshape(box, -1), axis=1, dtype=np.uint8)
    except Exception as error:  # the decoder's own error type is not public
        raise CellsError("its bytes in the shard are damaged") from error


def write_table(path: Path, rows: Iterable[CropRow], target: str, split: str) -> int:
    """Write sc-metadata.csv, row after row.

    Args:
        path: of the table.
        rows: read once, so that they need not fit into memory.
        target: name of the target column.
        split: name of the split column.

    Returns:
        How many rows were written.
    """
    count = 0
    with replacing(path) as neighbour, open(neighbour, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", X, Y, "Key", "Target", target, split, "Image_Name"])
        for row in rows:
            writer.writerow([row.number, row.x, row.y, row.key, row.target, row.label, row.split, row.image_name])
            count += 1
    return count


class IndexWriter:
    """Writes crops.parquet in pieces of some thousand rows; use it in a `with`."""

    def __init__(
        self, path: Path, box: int, channels: Sequence[str], masked: bool, rows_per_piece: int = 16384
    ) -> None:
        import pyarrow as arrow

        fields = {
            X: arrow.float64(),
            Y: arrow.float64(),
            "Key": arrow.string(),
            "Target": arrow.int32(),
            "Label": arrow.string(),
            "Split": arrow.string(),
            "Image_Name": arrow.string(),
            "Shard": arrow.string(),
            "Offset": arrow.int64(),
            "Length": arrow.int32(),
            "Crc32": arrow.int64(),
        }
        about = {"codec": CODEC, "box": str(box), "channels": "\t".join(channels), "masked": str(int(masked))}
        self.schema = arrow.schema(list(fields.items()), metadata=about)
        self.path = path
        self._rows: list[CropRow] = []
        self._piece = rows_per_piece
        self._context: Any = None
        self._writer: Any = None

    def __enter__(self) -> IndexWriter:
        """Open a neighbour of the file."""
        import pyarrow.parquet as parquet

        self._context = replacing(self.path)
        self._writer = parquet.ParquetWriter(self._context.__enter__(), self.schema, compression="zstd")
        return self

    def add(self, row: CropRow) -> CropRow:
        """Take one row; returns it."""
        self._rows.append(row)
        if len(self._rows) >= self._piece:
            self._flush()
        return row

    def _flush(self) -> None:
        import pyarrow as arrow

        columns = [
            [float(r.x) for r in self._rows],
            [float(r.y) for r in self._rows],
            *([getattr(r, name) for r in self._rows] for name in ("key", "target", "label", "split", "image_name")),
            *([getattr(r, name) for r in self._rows] for name in ("shard", "offset", "length", "crc32")),
        ]
        arrays = [arrow.array(c, f.type) for c, f in zip(columns, self.schema, strict=True)]
        self._writer.write_table(arrow.Table.from_arrays(arrays, schema=self.schema))
        self._rows = []

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Put the file in place, or drop it after an error."""
        if kind is None and self._rows:
            self._flush()
        self._writer.close()
        self._context.__exit__(kind, error, trace)


class CropReader:
    """Reads any crop of a folder by the rows of its table, PNG tree or shards alike.

    Attributes:
        folder: of sc-metadata.csv.
        rows: one dict per crop, as sc-metadata.csv has them.
        sharded: whether the crops lie in shards.
    """

    def __init__(self, folder: Path, table: str = TABLE) -> None:
        self.folder = Path(folder)
        self.rows = list(read_table(self.folder / table))
        self.sharded = (self.folder / INDEX).is_file()
        self._places: dict[str, tuple[str, int, int, int]] = {}
        self._box = 0
        if self.sharded:
            self._read_index()

    def _read_index(self) -> None:
        import pyarrow.parquet as parquet

        try:
            table = parquet.read_table(
                self.folder / INDEX, columns=["Image_Name", "Shard", "Offset", "Length", "Crc32"]
            )
        except (OSError, ValueError) as error:
            raise CellsError(f"{self.folder / INDEX} cannot be read: {error}") from error
        about = table.schema.metadata or {}
        if about.get(b"codec") != CODEC.encode():
            raise CellsError(f"{self.folder / INDEX} is not an index of crops written by scripts/cells")
        self._box = int(about[b"box"])
        columns = [table.column(i).to_pylist() for i in range(table.num_columns)]
        self._places = {name: place for name, *place in zip(*columns, strict=True)}  # type: ignore[misc]

    def __len__(self) -> int:
        """How many crops the table names."""
        return len(self.rows)

    def read(self, number: int) -> Strip:
        """Read the strip of one row.

        Raises:
            CellsError: it is missing or damaged, with its name.
        """
        name = self.rows[number]["Image_Name"]
        try:
            if not self.sharded:
                return decode_png((self.folder / name).read_bytes())
            shard, offset, length, crc32 = self._places[name]
            with open(self.folder / shard, "rb") as file:
                file.seek(offset)
                return decode_strip(file.read(length), self._box, crc32)
        except (OSError, KeyError) as error:
            raise CellsError(f"{self.folder / name} is missing: run scripts/cells check") from error
        except CellsError as error:
            raise CellsError(f"{self.folder / name}: {error}") from error


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """Read sc-metadata.csv row by row.

    Raises:
        CellsError: there is none, or it has no column Image_Name.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = {"Image_Name", "Key", "Target"} - set(reader.fieldnames or [])
            if missing:
                raise CellsError(f"{path} lacks the column {sorted(missing)[0]}")
            for row in reader:
                if None in row.values():
                    raise CellsError(f"{path}, row {reader.line_num}: too few values (a truncated file?)")
                yield row
    except OSError as error:
        raise CellsError(
            f"no table of crops at {path} ({error.strerror}): run scripts/cells sample or export"
        ) from error
