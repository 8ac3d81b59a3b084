"""The manifest beside an archive: what every byte of it is, where it comes from, and what it needs to run.

`vgg.cdx.json` beside `vgg.mar` is one CycloneDX document, which scanners of many makers read: the sha256 of the archive
and of each file in it, the model's card (data, figures, command, commit), and the packages it was checked with. The
same archive in the same environment gives the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import uuid
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from marten.errors import ArchiveError
from marten.files import write_text
from modelspec import sha256_file

SUFFIX = ".cdx.json"
_MAR_MANIFEST = "MAR-INF/MANIFEST.json"
_NEEDED = ("torch", "torchvision", "torchserve", "pillow", "numpy", "pyyaml")
_OPTIONAL = ("openvino",)


def manifest_path(mar: Path) -> Path:
    """Where the manifest of an archive lies."""
    return mar.with_name(mar.name.removesuffix(".mar") + SUFFIX)


def signature_path(mar: Path) -> Path:
    """Where the signature of an archive's manifest lies."""
    return manifest_path(mar).with_name(manifest_path(mar).name + ".sig")


def write_manifest(mar: Path) -> Path:
    """Describe an archive and put the description beside it; a signature of an older one goes.

    Raises:
        ArchiveError: it cannot be read as an archive.
    """
    path = manifest_path(mar)
    signature_path(mar).unlink(missing_ok=True)
    write_text(path, json.dumps(describe(mar), indent=2, ensure_ascii=False) + "\n")
    return path


def describe(mar: Path) -> dict[str, Any]:
    """The CycloneDX 1.6 document of an archive.

    Raises:
        ArchiveError: it cannot be read as an archive.
    """
    digest, members = sha256_file(mar), member_digests(mar)
    about, card = _read_inside(mar)
    name, version = about["modelName"], about["modelVersion"]
    reference = f"{name}@{version}"
    model = {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": name,
        "version": version,
        "hashes": _hashes(digest),
        **({"modelCard": _model_card(card)} if card else {}),
        "properties": _properties(mar, card),
    }
    files: list[dict[str, Any]] = [
        {"type": "file", "bom-ref": f"file:{member}", "name": member, "hashes": _hashes(value)}
        for member, value in members.items()
    ]
    packages = [*_packages(_NEEDED, "required"), *_packages(_OPTIONAL, "optional")]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'sha256:{digest}')}",
        "version": 1,
        "metadata": {"component": model},
        "components": [*files, *packages],
        "dependencies": [{"ref": reference, "dependsOn": [part["bom-ref"] for part in (*files, *packages)]}],
    }


def check_digest(mar: Path) -> str | None:
    """Compare an archive with its manifest's sha256; None where no manifest lies beside it.

    Returns:
        The sha256 that both agree on.

    Raises:
        ArchiveError: they disagree, or the manifest cannot be read.
    """
    if not manifest_path(mar).is_file():
        return None
    listed, found = _listed(read_manifest(mar)["metadata"]["component"]), sha256_file(mar)
    if listed != found:
        raise ArchiveError(
            f"{mar} has sha256 {found[:16]}…, but its manifest {manifest_path(mar).name} says {listed[:16]}…: it was "
            "changed or built by hand since. `scripts/archive verify` tells which files; serve it only if you know why"
        )
    return found


def verify(mar: Path) -> dict[str, Any]:
    """Compare an archive, file by file, with its manifest.

    Returns:
        The manifest.

    Raises:
        ArchiveError: there is no manifest, or it tells of other bytes; names every file that differs.
    """
    manifest = read_manifest(mar)
    listed = {part["name"]: _listed(part) for part in manifest["components"] if part["type"] == "file"}
    found = member_digests(mar)
    differences = [f"{name} is not listed" for name in sorted(found.keys() - listed.keys())]
    differences += [f"{name} is missing" for name in sorted(listed.keys() - found.keys())]
    differences += [
        f"{name} is another" for name in sorted(found.keys() & listed.keys()) if found[name] != listed[name]
    ]
    if differences:
        raise ArchiveError(f"{mar} is not what {manifest_path(mar).name} tells: {'; '.join(differences)}")
    check_digest(mar)
    about, card = _read_inside(mar)
    component = manifest["metadata"]["component"]
    if (component["name"], component["version"]) != (about["modelName"], about["modelVersion"]):
        raise ArchiveError(f"{manifest_path(mar)} tells of {component['bom-ref']}, {mar} calls itself {about}")
    weights = found.get(str(about.get("serializedFile")))
    if card and weights != card["weights_sha256"]:
        raise ArchiveError(f"{mar}: the weights have sha256 {weights}, its card says {card['weights_sha256']}")
    return manifest


def read_manifest(mar: Path) -> dict[str, Any]:
    """The manifest beside an archive.

    Raises:
        ArchiveError: there is none, or it is no manifest of an archive.
    """
    path = manifest_path(mar)
    if not path.is_file():
        raise ArchiveError(f"{mar} has no manifest beside it: scripts/archive writes {path.name} with every archive")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _listed(manifest["metadata"]["component"])
        for part in manifest["components"]:
            _ = part["name"], part["type"] != "file" or _listed(part)
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise ArchiveError(f"{path} is no manifest of an archive: {error!r}. Build the archive anew") from error
    return dict(manifest)


def archive_version(mar: Path) -> str:
    """The version that an archive gives itself, as TorchServe lists it.

    Raises:
        ArchiveError: it cannot be read as an archive.
    """
    return str(_read_inside(mar)[0]["modelVersion"])


def member_digests(mar: Path) -> dict[str, str]:
    """sha256 of each file in an archive, sorted by name.

    Raises:
        ArchiveError: it is no zip, is damaged, holds a name twice, or one that would be unpacked elsewhere.
    """
    try:
        with zipfile.ZipFile(mar) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            _check_names(mar, names)
            digests = {}
            for name in sorted(names):
                digest = hashlib.sha256()
                with archive.open(name) as member:
                    while block := member.read(1 << 20):
                        digest.update(block)
                digests[name] = digest.hexdigest()
            return digests
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        raise ArchiveError(f"{mar} is no readable .mar: {error}") from error


def _check_names(mar: Path, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    outside = [name for name in names if name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts]
    if twice or outside:
        raise ArchiveError(f"{mar} holds {', '.join(twice + outside)} twice or outside of itself: do not unpack it")


def _read_inside(mar: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What TorchServe reads of an archive, and the model card, where it holds one."""
    try:
        with zipfile.ZipFile(mar) as archive:
            about = json.loads(archive.read(_MAR_MANIFEST))["model"]
            _ = about["modelName"], about["modelVersion"]
            card_name = f"{PurePosixPath(about.get('serializedFile') or '').stem}.json"
            card = json.loads(archive.read(card_name)) if card_name in archive.namelist() else None
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ArchiveError(f"{mar} is no readable .mar: {error!r}") from error
    return about, card if isinstance(card, dict) and "weights_sha256" in card else None


def _model_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card in CycloneDX's words."""
    spec, data = card["spec"], card.get("data", {})
    known = [(key, value) for key, value in data.items() if isinstance(value, str | int | dict) and key != "name"]
    dataset = {
        "type": "dataset",
        "name": str(data.get("name", "unknown")),
        "contents": {"properties": [{"name": key, "value": _text(value)} for key, value in known]},
    }
    figures = [
        _figure(name, told)
        for name, told in card.get("metrics", {}).items()
        if isinstance(told, Mapping) and "value" in told
    ]
    return {
        "modelParameters": {
            "task": spec.get("task", "classification"),
            "modelArchitecture": spec["arch"],
            **({"datasets": [dataset]} if data else {}),
        },
        **({"quantitativeAnalysis": {"performanceMetrics": figures}} if figures else {}),
    }


def _figure(name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    figure: dict[str, Any] = {"type": name, "value": _text(told["value"])}
    if "interval_95" in told:
        low, high = told["interval_95"]
        figure["confidenceInterval"] = {"lowerBound": _text(low), "upperBound": _text(high)}
    return figure


def _properties(mar: Path, card: Mapping[str, Any] | None) -> list[dict[str, str]]:
    told: dict[str, Any] = {"bytes": mar.stat().st_size}
    if card:
        told |= {"weights_sha256": card["weights_sha256"], **card.get("provenance", {})}
    return [{"name": f"marten:{key}", "value": _text(value)} for key, value in told.items()]


def _packages(names: tuple[str, ...], scope: str) -> list[dict[str, str]]:
    """The packages that are installed here, where the archive was loaded and compared with its model."""
    found = []
    for name in names:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        purl = f"pkg:pypi/{name}@{version}"
        part = {"type": "library", "bom-ref": purl, "name": name, "version": version, "scope": scope, "purl": purl}
        found.append(part)
    return found


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _listed(part: Mapping[str, Any]) -> str:
    """The sha256 that a component of the manifest gives."""
    return str(next(each["content"] for each in part["hashes"] if each["alg"] == "SHA-256"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
