"""A full disk is one clear line, leaves nothing half written, and the same command goes on when there is room again."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from marten.archive import plan_archive, write_archive
from marten.datasets import find_pictures
from marten.errors import MartenError
from marten.inference import Table
from marten.shards import write_shards
from marten.staging import stage
from tests.runs import draw_set, run_once

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which only root may")


class Disk:
    """A file system in memory of a given size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, kb: int) -> None:
        words = ["mount", "-o", f"remount,size={kb}k", str(self.folder)]
        subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """One of 64 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine mounts no tmpfs: {done.stderr.strip()}")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def refusal(act: Callable[[], object]) -> str:
    """The one line that an act ends with."""
    with pytest.raises(MartenError) as caught:
        act()
    told = str(caught.value)
    assert "\n" not in told
    return told


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_staging_a_tar_ends_and_is_taken_up_with_more_room(disk: Disk, tmp_path: Path) -> None:
    for number in range(8):
        path = tmp_path / "made" / f"cat.{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(15_000))
    with tarfile.open(tmp_path / "pets.tgz", "w:gz") as archive:
        archive.add(tmp_path / "made", "pets")
    told = refusal(lambda: stage(tmp_path / "pets.tgz", disk.folder))
    assert "name another disk with --into" in told
    assert not (disk.folder / "pets").exists()
    kept = {path.name: path.stat().st_ino for path in disk.folder.rglob("*.jpg")}
    assert len(kept) >= 2
    disk.resize(400)
    staged = stage(tmp_path / "pets.tgz", disk.folder)
    assert staged.files == 8
    found = {path.name: path for path in staged.folder.rglob("*.jpg")}
    assert all(found[name].stat().st_ino == inode for name, inode in kept.items()), "written again"
    assert all(path.read_bytes() == (tmp_path / "made" / name).read_bytes() for name, path in found.items())


def test_packing_shards_leaves_nothing(disk: Disk, tmp_path: Path) -> None:
    data = draw_set(tmp_path / "data", 40)
    told = refusal(lambda: write_shards(find_pictures(data), disk.folder / "packed"))
    assert "No space left on device. Nothing is left there." in told
    assert names(disk.folder) == []
    disk.resize(1000)
    assert len(write_shards(find_pictures(data), disk.folder / "packed").samples) == 40


def test_a_table_of_answers_keeps_what_is_answered(disk: Disk) -> None:
    table = Table(disk.folder / "dog_probs.csv", ["fileid", "prob"], {"model": "a"})
    batches = [[(f"{start + i:08d}", [0.25]) for i in range(500)] for start in range(0, 12_000, 500)]
    told = refusal(lambda: [table.add(rows, list) for rows in batches])
    assert "No space left on device. What is answered is kept" in told
    disk.resize(2000)
    again = Table(disk.folder / "dog_probs.csv", ["fileid", "prob"], {"model": "a"})
    assert again.done >= 500
    rows = [row for rows in batches for row in rows]
    again.add(rows[again.done :], list)
    again.finish()
    lines = (disk.folder / "dog_probs.csv").read_text().splitlines()
    assert lines == ["fileid,prob", *(f"{id_},0.250000" for id_, _ in rows)]


def test_a_run_of_training_ends_with_a_line_and_goes_on(disk: Disk, drawn_set: Path) -> None:
    told = refusal(lambda: run_once(drawn_set, disk.folder, epochs=1))
    assert "No space left on device" in told
    assert [name for name in names(disk.folder) if name.endswith((".pth", ".pt"))] == []
    disk.resize(60_000)
    assert run_once(drawn_set, disk.folder, epochs=1) == 0
    assert {"model.pth", "model.json"} <= set(names(disk.folder))


def test_an_archive_that_finds_no_room_leaves_the_old_one(
    disk: Disk, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    archive = plan_archive(tiny_model(), export_path=disk.folder, parts=tmp_path / "parts")
    archive.mar.write_bytes(b"the old one")
    told = refusal(lambda: write_archive(archive))
    assert "No space left on device. What was there before is untouched." in told
    assert (names(disk.folder), archive.mar.read_bytes()) == ([archive.mar.name], b"the old one")
