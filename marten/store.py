"""The model store as a registry: versions that never change, one of each model in place, the way back kept.

    deployment/model-store/
        vgg.mar  vgg.cdx.json          what is served: a copy of the promoted version
        versions/vgg/1.0.mar …         every version, with its manifest
        index.json                     which versions there are, which is in place, which were before

TorchServe sees the first line alone. `promote` puts a version in place in one step; `marten.rollout` then tells a
running server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from marten.archive_check import NAME
from marten.errors import ArchiveError, UsageError
from marten.files import replacing, write_text
from marten.manifest import check_digest, manifest_path, read_manifest, signature_path, verify, write_manifest

FORMAT = "marten-store/1"


@dataclasses.dataclass
class Shelf:
    """One model of the store.

    Attributes:
        serving: the version in place as NAME.mar; empty while there is none.
        former: versions that were in place before, the latest last.
        versions: by version: sha256 of the archive, its bytes, and when it was added (UTC).
    """

    serving: str = ""
    former: list[str] = dataclasses.field(default_factory=list)
    versions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def read_index(store: Path) -> dict[str, Shelf]:
    """The store's models by name; empty for a store without an index.

    Raises:
        ArchiveError: index.json is none of a store.
    """
    path = store / "index.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']!r}")
        return {name: Shelf(**shelf) for name, shelf in told["models"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArchiveError(f"{path} is no index of the format {FORMAT}: {error!r}") from error


def version_path(store: Path, name: str, version: str) -> Path:
    """Where the archive of one version is kept."""
    return store / "versions" / name / f"{version}.mar"


def add(store: Path, mar: Path) -> tuple[str, str]:
    """Keep an archive as a version of its model; one that is kept already is left as it is.

    Returns:
        Name and version, as the archive gives them.

    Raises:
        ArchiveError: it is not what its manifest says, or another archive has this version.
    """
    with _locked(store):
        index = read_index(store)
        name, version = _keep(store, index, mar)
        _write_index(store, index)
    return name, version


def promote(store: Path, name: str, version: str) -> str:
    """Put a version in place as NAME.mar.

    What lay there and was never added is added first, so that there is a way back.

    Returns:
        The version that was in place before; empty when there was none.

    Raises:
        UsageError: no such model or version; names those there are.
        ArchiveError: the version's bytes are not those that were added.
    """
    with _locked(store):
        index = read_index(store)
        shelf = _find(index, name, version)
        before = _adopt(store, index, name)
        _put_in_place(store, name, version, shelf)
        if before and before != version:
            shelf.former.append(before)
        shelf.serving = version
        _write_index(store, index)
    return before


def roll_back(store: Path, name: str) -> str:
    """Put in place what was there before.

    Returns:
        The version that is in place now.

    Raises:
        UsageError: no such model, or nothing was in place before.
    """
    with _locked(store):
        index = read_index(store)
        shelf = _find(index, name)
        if not shelf.former:
            raise UsageError(f"{name}: nothing was in place before {shelf.serving or 'now'}; scripts/store list")
        version = shelf.former[-1]
        _put_in_place(store, name, version, shelf)
        shelf.former.pop()
        shelf.serving = version
        _write_index(store, index)
    return version


def remove(store: Path, name: str, version: str) -> None:
    """Forget a version that is not in place.

    Raises:
        UsageError: no such version, or it is in place.
    """
    with _locked(store):
        index = read_index(store)
        shelf = _find(index, name, version)
        if shelf.serving == version:
            raise UsageError(f"{name} {version} is in place: promote another one first")
        del shelf.versions[version]
        shelf.former = [each for each in shelf.former if each != version]
        _write_index(store, index)
        kept = version_path(store, name, version)
        for path in (kept, manifest_path(kept), signature_path(kept)):
            path.unlink(missing_ok=True)


def audit(store: Path) -> list[str]:
    """Compare every archive of the store with its manifest and the index.

    Returns:
        What is wrong, one line each; empty when all is well.
    """
    index = read_index(store)
    wrong = []
    archives = {path: "" for path in sorted(store.glob("*.mar")) if not path.name.startswith(".")}
    for name, shelf in index.items():
        for version, told in shelf.versions.items():
            archives[version_path(store, name, version)] = str(told["sha256"])
        if shelf.serving:
            archives[store / f"{name}.mar"] = str(shelf.versions[shelf.serving]["sha256"])
    for path, listed in archives.items():
        try:
            verify(path)
            if listed and check_digest(path) != listed:
                wrong.append(f"{path} is not the archive that the index tells of")
        except ArchiveError as error:
            wrong.append(str(error))
    return wrong


def _keep(store: Path, index: dict[str, Shelf], mar: Path) -> tuple[str, str]:
    component = verify(mar)["metadata"]["component"]
    name, version = component["name"], component["version"]
    if not NAME.fullmatch(name) or not NAME.fullmatch(version):
        raise ArchiveError(f"{mar} calls itself {name!r}, version {version!r}: letters, digits, '-', '_' and '.' alone")
    shelf = index.setdefault(name, Shelf())
    digest = component["hashes"][0]["content"]
    known = shelf.versions.get(version)
    if known is None:
        _copy(mar, version_path(store, name, version))
        added = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        shelf.versions[version] = {"sha256": digest, "bytes": mar.stat().st_size, "added": added}
    elif known["sha256"] != digest:
        raise ArchiveError(
            f"{name} {version} is kept already, with other bytes: a version never changes. "
            "Build this one with scripts/archive --version NEXT"
        )
    return name, version


def _adopt(store: Path, index: dict[str, Shelf], name: str) -> str:
    """The version in place, added now where it was put there past the store; empty when there is none."""
    mar, shelf = store / f"{name}.mar", index[name]
    if not mar.is_file():
        return ""
    if not manifest_path(mar).is_file():
        write_manifest(mar)
    told = read_manifest(mar)["metadata"]["component"]
    if told["name"] != name:
        raise ArchiveError(f"{mar} calls itself {told['name']}: move it away, or rebuild it with --name {name}")
    return _keep(store, index, mar)[1] if told["hashes"][0]["content"] != _serving_digest(shelf) else shelf.serving


def _serving_digest(shelf: Shelf) -> str:
    return str(shelf.versions[shelf.serving]["sha256"]) if shelf.serving else ""


def _put_in_place(store: Path, name: str, version: str, shelf: Shelf) -> None:
    kept = version_path(store, name, version)
    verify(kept)
    if check_digest(kept) != shelf.versions[version]["sha256"]:
        raise ArchiveError(f"{kept} is not the archive that was added: scripts/store verify")
    _copy(kept, store / f"{name}.mar")


def _copy(mar: Path, to: Path) -> None:
    """Copy an archive with its manifest and signature; the archive last, so that a half-done copy is refused."""
    for source, target in (
        (signature_path(mar), signature_path(to)),
        (manifest_path(mar), manifest_path(to)),
        (mar, to),
    ):
        if source.is_file():
            with replacing(target) as neighbour:
                shutil.copyfile(source, neighbour)
        else:
            target.unlink(missing_ok=True)


def _find(index: dict[str, Shelf], name: str, version: str | None = None) -> Shelf:
    if name not in index:
        raise UsageError(f"the store has no model {name!r}; it has {', '.join(index) or 'none'}: scripts/store add MAR")
    shelf = index[name]
    if version is not None and version not in shelf.versions:
        raise UsageError(f"{name} has no version {version!r}; it has {', '.join(shelf.versions) or 'none'}")
    return shelf


def _write_index(store: Path, index: dict[str, Shelf]) -> None:
    models = {name: dataclasses.asdict(shelf) for name, shelf in sorted(index.items())}
    write_text(store / "index.json", json.dumps({"format": FORMAT, "models": models}, indent=2) + "\n")


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    """One change at a time."""
    store.mkdir(parents=True, exist_ok=True)
    with open(store / ".lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
