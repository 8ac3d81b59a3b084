"""The model store as a registry: versions that never change, one in place, the way back."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from marten import store
from marten.errors import ArchiveError, UsageError
from marten.manifest import manifest_path, write_manifest
from modelspec import sha256_file
from tests.servers import ECHO, ROOT, build_archive


def build_version(folder: Path, version: str, handler: str = ECHO, name: str = "echo") -> Path:
    """An archive of that version, its manifest beside it."""
    mar = build_archive(folder / f"{version}-{abs(hash(handler))}", name, handler)
    with zipfile.ZipFile(mar) as archive:
        files = {member: archive.read(member) for member in archive.namelist()}
    manifest = json.loads(files["MAR-INF/MANIFEST.json"])
    manifest["model"]["modelVersion"] = version
    files["MAR-INF/MANIFEST.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(mar, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
    write_manifest(mar)
    return mar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def two(folder: Path, tmp_path: Path) -> tuple[str, str]:
    """A store that keeps versions 1.0 and 2.0, and what their archives' sha256 are."""
    archives = [build_version(tmp_path, version) for version in ("1.0", "2.0")]
    assert [store.add(folder, mar) for mar in archives] == [("echo", "1.0"), ("echo", "2.0")]
    return sha256_file(archives[0]), sha256_file(archives[1])


def in_place(folder: Path) -> str:
    return sha256_file(folder / "echo.mar")


def test_promote_and_roll_back(folder: Path, two: tuple[str, str]) -> None:
    assert not (folder / "echo.mar").exists()
    assert store.promote(folder, "echo", "1.0") == ""
    assert in_place(folder) == two[0]
    assert store.promote(folder, "echo", "2.0") == "1.0"
    assert in_place(folder) == two[1]
    assert store.roll_back(folder, "echo") == "1.0"
    assert in_place(folder) == two[0]
    assert manifest_path(folder / "echo.mar").is_file()
    assert store.audit(folder) == []
    with pytest.raises(UsageError, match="nothing was in place before"):
        store.roll_back(folder, "echo")


def test_a_version_never_changes(folder: Path, two: tuple[str, str], tmp_path: Path) -> None:
    other = build_version(tmp_path, "2.0", ECHO + "\n# another\n")
    with pytest.raises(ArchiveError, match="a version never changes"):
        store.add(folder, other)
    kept = folder / "versions" / "echo" / "2.0.mar"
    assert sha256_file(kept) == two[1]
    assert store.add(folder, kept) == ("echo", "2.0")


def test_what_lay_in_place_past_the_store_is_kept_first(folder: Path, tmp_path: Path) -> None:
    build_archive(folder, "echo")  # version 1.0, without a manifest, as by hand
    by_hand = in_place(folder)
    store.add(folder, build_version(tmp_path, "2.0"))
    assert store.promote(folder, "echo", "2.0") == "1.0"
    assert in_place(folder) != by_hand
    assert store.roll_back(folder, "echo") == "1.0"
    assert in_place(folder) == by_hand


def test_a_version_that_was_tampered_with_is_not_put_in_place(folder: Path, two: tuple[str, str]) -> None:
    store.promote(folder, "echo", "1.0")
    kept = folder / "versions" / "echo" / "2.0.mar"
    with zipfile.ZipFile(kept, "a") as archive:
        archive.writestr("evil.py", "import os")
    with pytest.raises(ArchiveError, match=r"evil\.py is not listed"):
        store.promote(folder, "echo", "2.0")
    assert in_place(folder) == two[0]
    assert [line for line in store.audit(folder) if "evil.py" in line]
    write_manifest(kept)  # who can change the archive can change its manifest: the index still knows better
    with pytest.raises(ArchiveError, match="not the archive that was added"):
        store.promote(folder, "echo", "2.0")
    assert store.audit(folder) == [f"{kept} is not the archive that the index tells of"]


def test_the_version_in_place_cannot_be_removed(folder: Path, two: tuple[str, str]) -> None:
    store.promote(folder, "echo", "1.0")
    store.promote(folder, "echo", "2.0")
    with pytest.raises(UsageError, match="is in place"):
        store.remove(folder, "echo", "2.0")
    store.remove(folder, "echo", "1.0")
    assert not (folder / "versions" / "echo" / "1.0.mar").exists()
    with pytest.raises(UsageError, match="nothing was in place before"):
        store.roll_back(folder, "echo")


@pytest.mark.parametrize(("name", "version", "words"), [("dog", "1.0", "has echo"), ("echo", "9", "it has 1.0, 2.0")])
def test_unknown_names_list_the_known(folder: Path, two: tuple[str, str], name: str, version: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        store.promote(folder, name, version)


def test_a_name_that_leads_out_of_the_store_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="letters, digits"):
        store.add(folder, build_version(tmp_path, "..", ECHO))


def test_a_foreign_index_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    (folder / "index.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ArchiveError, match="is no index of the format"):
        store.add(folder, build_version(tmp_path, "1.0"))
    assert (folder / "index.json").read_text(encoding="utf-8") == "[]"


def test_the_command_says_what_it_did(folder: Path, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "store"), *words, "--model_store", str(folder)]
        return subprocess.run([*command, "--port", "1"], capture_output=True, text=True, timeout=60)

    for version in ("1.0", "2.0"):
        assert run("add", str(build_version(tmp_path, version))).returncode == 0
        assert run("promote", "echo", version).stdout.startswith(f"echo {version} is in place")
    assert ["in place" in line for line in run("list").stdout.splitlines()] == [False, True]
    assert run("rollback", "echo").stdout == "echo 1.0 is in place again\n"
    assert run("verify").returncode == 0
    misused = run("promote", "echo")
    assert misused.returncode == 2
    assert "promote takes NAME VERSION" in misused.stderr
