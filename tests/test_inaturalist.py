"""iNaturalist is staged under torchvision's names, held to its sums, and labelled as torchvision labels it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from torchvision.datasets import INaturalist, inaturalist

import marten.inaturalist
from marten.datasets import find_pictures
from marten.errors import DataError, UsageError
from marten.files import ROOT
from marten.inaturalist import RANKS, URL, VERSIONS, stage_inaturalist
from tests.pictures import draw, encode

SPECIES = (
    "00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris",
    "00001_Animalia_Arthropoda_Arachnida_Araneae_Agelenidae_Eratigena_duellica",
    "00002_Plantae_Tracheophyta_Magnoliopsida_Rosales_Rosaceae_Rosa_canina",
)
CATEGORIES = {
    "2017": ("Aves/Acanthis flammea", "Aves/Accipiter cooperii", "Plantae/Acer rubrum"),
    "2018": ("Aves/0", "Aves/2", "Plantae/1"),
    "2019": ("Birds/1", "Birds/2", "Plants/0"),
    **dict.fromkeys(("2021_train", "2021_train_mini", "2021_valid"), SPECIES),
}


def test_names_and_sums_are_torchvisions() -> None:
    assert {name: URL + about.file for name, about in VERSIONS.items()} == inaturalist.DATASET_URLS
    assert {name: about.md5 for name, about in VERSIONS.items()} == inaturalist.DATASET_MD5
    assert list(RANKS) == inaturalist.CATEGORIES_2021


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small archives of all versions, laid out as the real ones, and their sums in place of those."""
    folder = tmp_path / "inat"
    folder.mkdir()
    for number, (version, categories) in enumerate(CATEGORIES.items()):
        about = VERSIONS[version]
        for index, category in enumerate(reversed(categories)):
            for picture in range(2):
                path = tmp_path / "made" / version / about.below / category / f"{picture}-{index}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode(draw(10 * number + 2 * index + picture, (20, 16)), "JPEG"))
        archive = folder / Path(about.file).name
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(tmp_path / "made" / version / about.below, about.below)
        summed = replace(about, md5=hashlib.md5(archive.read_bytes()).hexdigest())
        monkeypatch.setitem(marten.inaturalist.VERSIONS, version, summed)
    return folder


@pytest.mark.parametrize("version", VERSIONS)
def test_torchvision_reads_what_was_staged_and_gives_it_the_same_labels(
    mirror: Path, tmp_path: Path, version: str
) -> None:
    into = tmp_path / "node"
    targets = ("full", *RANKS) if version.startswith("2021") else ("full", "super")
    for target in targets:
        staged, table = stage_inaturalist(mirror, version, target, into)
        assert (staged.folder, table) == (into / version, into / f"{version}.{target}.csv")
        ours = find_pictures(table, labels=None if target != "kingdom" else ("Animalia", "Plantae"))
        theirs = INaturalist(into, version, target_type=target, loader=str)
        told = {path: theirs.category_name(target, label) for path, label in theirs}
        assert {str(s.path): ours.labels[s.label] for s in ours.samples} == told
        assert [s.id for s in ours.samples] == sorted(s.id for s in ours.samples)
        assert len(ours.samples) == 6


def test_torchvisions_own_name_and_a_set_that_is_unpacked_are_found(mirror: Path, tmp_path: Path) -> None:
    (mirror / "val.tar.gz").rename(mirror / "2021_valid.tgz")
    staged, table = stage_inaturalist(mirror, "2021_valid", into=tmp_path / "node")
    unpacked, again = stage_inaturalist(tmp_path / "node", "2021_valid", into=tmp_path / "linked", link=True)
    assert unpacked.folder.readlink() == staged.folder
    assert again.read_text() == table.read_text()


def test_what_is_not_there_damaged_or_unknown_is_told(mirror: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2021_train_mini, 2021_valid, found '2022'"):
        stage_inaturalist(mirror, "2022")
    with pytest.raises(UsageError, match=r"full, super for iNaturalist 2018, found 'genus'"):
        stage_inaturalist(mirror, "2018", "genus")
    with pytest.raises(DataError, match=r"neither 2019.tgz nor train_val2019.tar.gz nor 2019: fetch https"):
        stage_inaturalist(tmp_path, "2019")
    (mirror / "train.tar.gz").write_bytes((mirror / "train_mini.tar.gz").read_bytes())
    with pytest.raises(DataError, match="outside of train/: it is another archive"):
        stage_inaturalist(mirror, "2021_train", into=tmp_path / "node")
    (mirror / "val.tar.gz").write_bytes((mirror / "val.tar.gz").read_bytes() + b"\0" * 512)
    with pytest.raises(DataError, match="has the md5"):
        stage_inaturalist(mirror, "2021_valid", into=tmp_path / "node")
    assert not [p for p in (tmp_path / "node").iterdir() if p.name.startswith("2021_valid") and p.suffix != ".lock"]


def test_the_command_refuses_another_archive_of_that_name(tmp_path: Path) -> None:
    """With the real sums: no small archive has them."""
    (tmp_path / "made" / "val" / SPECIES[0]).mkdir(parents=True)
    (tmp_path / "made" / "val" / SPECIES[0] / "a.jpg").write_bytes(b"x")
    with tarfile.open(tmp_path / "val.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "made" / "val", "val")
    words = [sys.executable, str(ROOT / "scripts" / "stage"), str(tmp_path), "--into", str(tmp_path / "node")]
    done = subprocess.run([*words, "--inaturalist", "2021_valid"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "not f6f6e0e242e3d4c9569ba56400938afc: it is damaged or another file" in done.stderr
    assert subprocess.run([*words, "--target", "genus"], capture_output=True).returncode == 2
