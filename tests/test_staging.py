"""Data sets arrive whole, once, and as they were promised."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from marten import staging, unpacking
from marten.errors import DataError
from marten.files import ROOT
from marten.staging import node_local_folder, stage

FILES = {f"train/{label}.{i}.jpg": f"{label}{i}".encode() * (i + 1) for label in ("cat", "dog") for i in range(20)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "pets" / ".DS_Store").write_text("litter")
    return tmp_path / "pets"


@pytest.fixture
def zipped(folder: Path) -> Path:
    path = folder.with_name("pets.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
        archive.writestr("__MACOSX/train/._cat.0.jpg", "litter")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz", "tar.gz", "folder"])
def test_every_kind_arrives_whole_and_once(folder: Path, zipped: Path, tmp_path: Path, kind: str) -> None:
    source = {"zip": zipped, "folder": folder}.get(kind, tmp_path / f"pets.{kind}")
    if kind not in ("zip", "folder"):
        with tarfile.open(source, "w" if kind == "tar" else "w:gz") as archive:
            archive.add(folder / "train", "train")
    staged = stage(source, tmp_path / "node")
    assert (staged.folder, staged.files, staged.fresh) == (tmp_path / "node" / "pets", 40, True)
    assert content(staged.folder) == FILES
    assert staged.size_bytes == sum(map(len, FILES.values()))
    again = stage(source, tmp_path / "node")
    assert not again.fresh
    assert (again.folder, again.sha256) == (staged.folder, staged.sha256)
    assert sorted(p.name for p in (tmp_path / "node").iterdir()) == ["pets", "pets.lock", "pets.staged.json"]


def test_an_interrupted_try_is_taken_up(zipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(zipped, tmp_path / "node", workers=1, progress=give_up)
    (partial,) = (tmp_path / "node").glob("pets.partial-*")
    kept = {path: path.stat().st_ino for path in partial.rglob("*.jpg")}
    assert len(kept) >= 10
    staged = stage(zipped, tmp_path / "node")
    assert content(staged.folder) == FILES
    inodes = {path.stat().st_ino for path in staged.folder.rglob("*.jpg")}
    assert set(kept.values()) <= inodes, "files that were there were written again"


def test_another_archive_of_that_name_takes_its_place(zipped: Path, tmp_path: Path) -> None:
    stage(zipped, tmp_path / "node")
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("cat.0.jpg", "new")
    assert content(stage(zipped, tmp_path / "node").folder) == {"cat.0.jpg": b"new"}


def test_what_nobody_staged_is_left_alone(zipped: Path, tmp_path: Path) -> None:
    mine = tmp_path / "disk" / "pets" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("ten years")
    with pytest.raises(DataError, match="was not staged"):
        stage(zipped, tmp_path / "disk")
    assert mine.read_text() == "ten years"
    inside = zipped.rename(zipped.with_name("pets") / "pets.zip")
    with pytest.raises(DataError, match="onto itself"):
        stage(inside, tmp_path)
    assert inside.is_file()


def test_an_end_between_the_set_and_its_marker_is_taken_up(
    zipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = staging.write_text, []

    def dies_second(path: Path, text: str) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, text)

    monkeypatch.setattr(staging, "write_text", dies_second)
    with pytest.raises(KeyboardInterrupt):
        stage(zipped, tmp_path / "disk")
    monkeypatch.undo()
    staged = stage(zipped, tmp_path / "disk")
    assert (staged.fresh, content(staged.folder)) == (True, FILES)


def test_b3_04_a_tar_crosses_the_network_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "pets.tgz"
    with tarfile.open(source, "w:gz") as archive:
        archive.add(folder / "train", "train")
    counts: list[int] = []
    readinto = unpacking._Summed.readinto

    def counting(self: unpacking._Summed, buffer: object) -> int:
        counts.append(readinto(self, buffer))
        return counts[-1]

    monkeypatch.setattr(unpacking._Summed, "readinto", counting)
    monkeypatch.setattr(unpacking, "_sums", None)
    md5 = hashlib.md5(source.read_bytes()).hexdigest()
    staged = stage(source, tmp_path / "node", digest=f"md5:{md5}")
    assert sum(counts) == source.stat().st_size
    assert staged.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()


def test_a_digest_is_held_to(zipped: Path, tmp_path: Path) -> None:
    data = zipped.read_bytes()
    for digest in (f"sha256:{hashlib.sha256(data).hexdigest()}", f"md5:{hashlib.md5(data).hexdigest()}"):
        assert stage(zipped, tmp_path / "node", digest=digest).files == 40
    with pytest.raises(DataError, match="damaged or another file"):
        stage(zipped, tmp_path / "other", digest="md5:" + "0" * 32)
    assert not (tmp_path / "other" / "pets").exists()


@pytest.mark.parametrize("keep", [0.5, 0.98])
@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_a_truncated_archive_is_one_line_and_leaves_no_set(
    folder: Path, zipped: Path, tmp_path: Path, kind: str, keep: float
) -> None:
    source = zipped
    if kind == "tgz":
        source = tmp_path / "pets.tgz"
        with tarfile.open(source, "w:gz") as archive:
            archive.add(folder / "train", "train")
    source.write_bytes(source.read_bytes()[: int(source.stat().st_size * keep)])
    with pytest.raises(DataError, match=r"damaged|cut short") as error:
        stage(source, tmp_path / "node")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "node" / "pets").exists()


def test_a_rotten_member_is_noticed(zipped: Path, tmp_path: Path) -> None:
    stored = tmp_path / "rot.zip"
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("cat.0.jpg", b"whole" * 100)
    stored.write_bytes(stored.read_bytes().replace(b"whole", b"wholf", 1))
    with pytest.raises(DataError, match="damaged"):
        stage(stored, tmp_path / "node")


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/outside.jpg"])
def test_a_name_that_leaves_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    hostile = tmp_path / "hostile.zip"
    with zipfile.ZipFile(hostile, "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(DataError, match="lies outside"):
        stage(hostile, tmp_path / "node")
    assert not (tmp_path / "outside.jpg").exists()


def test_b3_02_a_link_points_at_the_data(folder: Path, tmp_path: Path) -> None:
    staged = stage(folder, tmp_path / "node", link=True)
    assert staged.folder.readlink() == folder
    assert not stage(folder, tmp_path / "node", link=True).fresh
    assert (staged.folder / "train" / "cat.0.jpg").exists()


def test_tasks_of_one_node_bring_it_once(zipped: Path, tmp_path: Path) -> None:
    fresh: list[bool] = []
    tasks = [threading.Thread(target=lambda: fresh.append(stage(zipped, tmp_path / "node").fresh)) for _ in range(4)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    assert sorted(fresh) == [False, False, False, True]


def test_b3_03_it_goes_where_the_scheduler_gave_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_TMPDIR", "_CONDOR_SCRATCH_DIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TMPDIR", "_CONDOR_SCRATCH_DIR", "SLURM_TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
        assert node_local_folder() == tmp_path / name


def test_two_sets_of_one_name_do_not_meet_on_a_shared_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_TMPDIR", "_CONDOR_SCRATCH_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    staged = []
    for owner in ("me", "you"):
        (tmp_path / owner).mkdir()
        with zipfile.ZipFile(tmp_path / owner / "train.zip", "w") as archive:
            archive.writestr("whose.txt", owner)
        staged.append(stage(tmp_path / owner / "train.zip"))
    assert [content(s.folder) for s in staged] == [{"whose.txt": b"me"}, {"whose.txt": b"you"}]
    assert not stage(tmp_path / "me" / "train.zip").fresh


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which only root may")
def test_a_full_disk_is_one_line(zipped: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        big = tmp_path / "big.zip"
        with zipfile.ZipFile(big, "w") as archive:
            archive.writestr("cat.0.jpg", os.urandom(100_000))
        with pytest.raises(DataError, match=r"free: name another disk"):
            stage(big, small)
    finally:
        subprocess.run(["umount", small], check=True)


def test_the_command_prints_the_folder_alone(zipped: Path, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, ROOT / "scripts" / "stage", *words], capture_output=True, text=True)

    done = run(str(zipped), "--into", str(tmp_path / "node"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'node' / 'pets'}\n")
    assert "40 files" in done.stderr
    assert run(str(tmp_path / "none.zip")).returncode == 1
    assert run(str(zipped), "--link").returncode == 2
