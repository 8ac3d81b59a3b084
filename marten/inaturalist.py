"""iNaturalist, 2017 to 2021: its archives by name and checksum, and a table for each rank that can be learned.

What is staged is what torchvision.datasets.INaturalist reads, INaturalist(root=INTO, version=VERSION); beside it lies
<version>.<target>.csv, sorted, so that every node and every restart numbers and splits the pictures alike (B3-07).

Source: torchvision.datasets.inaturalist, whose names and MD5 sums these are; a test holds them equal.
"""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

from marten.errors import DataError, UsageError
from marten.files import write_text
from marten.staging import Staged, stage
from marten.unpacking import Progress

URL = "https://ml-inat-competition-datasets.s3.amazonaws.com/"
RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")


@dataclass(frozen=True)
class Version:
    """One archive of iNaturalist.

    Attributes:
        file: below `URL`; its last part is how mirrors call it.
        md5: of the archive.
    """

    file: str
    md5: str

    @property
    def below(self) -> str:
        """The folder in the archive that holds everything."""
        return Path(self.file).name.removesuffix(".tar.gz")


VERSIONS = {
    "2017": Version("2017/train_val_images.tar.gz", "7c784ea5e424efaec655bd392f87301f"),
    "2018": Version("2018/train_val2018.tar.gz", "b1c6952ce38f31868cc50ea72d066cc3"),
    "2019": Version("2019/train_val2019.tar.gz", "c60a6e2962c9b8ccbd458d12c8582644"),
    "2021_train": Version("2021/train.tar.gz", "e0526d53c7f7b2e3167b2b43bb2690ed"),
    "2021_train_mini": Version("2021/train_mini.tar.gz", "db6ed8330e634445efc8fec83ae81442"),
    "2021_valid": Version("2021/val.tar.gz", "f6f6e0e242e3d4c9569ba56400938afc"),
}


def stage_inaturalist(
    source: Path,
    version: str,
    target: str = "full",
    into: Path | None = None,
    *,
    workers: int = 4,
    link: bool = False,
    progress: Progress = lambda done, total: None,
) -> tuple[Staged, Path]:
    """Put one version on the node's own disk, or find it there, and write its table.

    Args:
        source: the archive, or a folder that holds it under torchvision's name (2021_valid.tgz) or its own
            (val.tar.gz), or that holds the set unpacked (2021_valid).
        version: of `VERSIONS`.
        target: "full" (species), or for 2021 a rank of `RANKS`, or until 2019 "super".
        into: folder that will hold the set and its table; the node's own disk when None.
        workers: threads that copy an unpacked set.
        link: make a symbolic link to an unpacked set instead of a copy.
        progress: as of `marten.staging.stage`.

    Returns:
        (where the set is, its table with the columns path and label, for --data_dir).

    Raises:
        UsageError: an unknown version, or a target that it does not have.
        DataError: nothing of that version there; says what to fetch. Or as `marten.staging.stage`.
    """
    if version not in VERSIONS:
        raise UsageError(f"--inaturalist must be one of {', '.join(VERSIONS)}, found {version!r}")
    targets = ("full", *RANKS) if version.startswith("2021") else ("full", "super")
    if target not in targets:
        raise UsageError(f"--target must be one of {', '.join(targets)} for iNaturalist {version}, found {target!r}")
    found = _find(source, version)
    about = VERSIONS[version]
    digest, below = ("", "") if found.is_dir() else (f"md5:{about.md5}", about.below)
    staged = stage(
        found,
        into,
        name=version,
        below=below,
        workers=workers,
        link=link and found.is_dir(),
        digest=digest,
        progress=progress,
    )
    table = staged.folder.with_name(f"{version}.{target}.csv")
    write_text(table, _table(staged.folder, version, target))  # anew: one of an older set may lie there
    return staged, table


def _find(source: Path, version: str) -> Path:
    if source.is_file():
        return source
    about = VERSIONS[version]
    names = (f"{version}.tgz", Path(about.file).name, version)
    for name in names:
        if (source / name).exists():
            return source / name
    raise DataError(
        f"no iNaturalist {version} in {source}, neither {' nor '.join(names)}: fetch {URL}{about.file} into it"
    )


def _table(folder: Path, version: str, target: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label"))
    for name in sorted(_pictures(folder)):
        writer.writerow((f"{folder.name}/{name}", _label(name, version, target, folder)))
    return text.getvalue()


def _pictures(folder: Path) -> list[str]:
    walked = os.walk(folder, followlinks=True)
    return [Path(place, name).relative_to(folder).as_posix() for place, _, names in walked for name in names]


def _label(name: str, version: str, target: str, folder: Path) -> str:
    """The label of a picture by its folders: 00042_Animalia_…_species, or until 2019 Reptiles/42."""
    parts = name.split("/")
    if not version.startswith("2021"):
        if len(parts) != 3:
            raise DataError(f"{folder} holds {name}, where iNaturalist {version} has super category/category/picture")
        return "/".join(parts[:2]) if target == "full" else parts[0]
    pieces = parts[0].split("_")
    if len(parts) != 2 or len(pieces) != 8:
        raise DataError(f"{folder} holds {name}, where iNaturalist 2021 has number_kingdom_…_species/picture")
    return parts[0] if target == "full" else pieces[1 + RANKS.index(target)]
