"""The manifest beside an archive: what it tells, what it refuses, who signed it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from marten.errors import ArchiveError, UsageError
from marten.manifest import check_digest, describe, manifest_path, signature_path, verify, write_manifest
from marten.serverconfig import find_archives
from marten.signing import check_signature, sign
from modelspec import sha256_file
from tests.servers import ROOT, build_archive

needs_ssh_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not here")


@pytest.fixture
def mar(tmp_path: Path) -> Path:
    """An archive without a network, its manifest beside it."""
    path = build_archive(tmp_path / "store", "echo")
    write_manifest(path)
    return path


@pytest.fixture(scope="module")
def real_mar(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive with weights and their card."""
    mar, weights = build_archive(tmp_path_factory.mktemp("manifest"), "pets"), tiny_model()
    about = {"modelName": "pets", "modelVersion": "2.1", "handler": "handler.py", "serializedFile": weights.name}
    rewrite(
        mar,
        {
            weights.name: weights.read_bytes(),
            f"{weights.stem}.json": weights.with_suffix(".json").read_bytes(),
            "MAR-INF/MANIFEST.json": json.dumps({"model": about}).encode(),
        },
    )
    return mar


def rewrite(mar: Path, changes: dict[str, bytes | None]) -> None:
    """Write an archive anew with other files; None leaves one out."""
    with zipfile.ZipFile(mar) as archive:
        files = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(mar, "w") as archive:
        for name, data in files.items():
            if data is not None:
                archive.writestr(name, data)


def key_pair(folder: Path, name: str) -> tuple[Path, str]:
    """A private key, and its line for the allowed signers."""
    key = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key], check=True)
    return key, f"{name}@example.org {key.with_suffix('.pub').read_text(encoding='utf-8')}"


def test_a_manifest_is_cyclonedx(real_mar: Path) -> None:
    """Judged by the schema that CycloneDX publishes, unknown keys refused."""
    validation = pytest.importorskip("cyclonedx.validation.json", reason="needs cyclonedx-python-lib")
    schema = pytest.importorskip("cyclonedx.schema")
    text = write_manifest(real_mar).read_text(encoding="utf-8")
    assert validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(text) is None
    broken = text.replace('"machine-learning-model"', '"witchcraft"')
    assert validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(broken) is not None


def test_a_manifest_tells_what_is_inside(real_mar: Path) -> None:
    told = describe(real_mar)
    component = told["metadata"]["component"]
    assert component["bom-ref"] == "pets@2.1"
    assert component["hashes"] == [{"alg": "SHA-256", "content": sha256_file(real_mar)}]
    files = {part["name"] for part in told["components"] if part["type"] == "file"}
    assert {"handler.py", "model_cat_dog_conv_net.pth", "MAR-INF/MANIFEST.json"} < files
    torch = next(part for part in told["components"] if part["name"] == "torch")
    assert torch["purl"].startswith("pkg:pypi/torch@")
    properties = {each["name"]: each["value"] for each in component["properties"]}
    assert properties["marten:created"] == "2024-05-06T07:08:09Z"
    assert component["modelCard"]["modelParameters"]["modelArchitecture"] == "cat_dog_conv_net"
    assert describe(real_mar) == told


def test_an_archive_as_it_was_built_is_accepted(real_mar: Path) -> None:
    write_manifest(real_mar)
    assert verify(real_mar)["metadata"]["component"]["name"] == "pets"
    assert check_digest(real_mar) == sha256_file(real_mar)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"handler.py": b"import os"}, "handler.py is another"),
        ({"evil.py": b"import os"}, "evil.py is not listed"),
        ({"where.py": None}, "where.py is missing"),
    ],
)
def test_a_changed_archive_is_refused_by_name(mar: Path, changes: dict[str, bytes | None], words: str) -> None:
    rewrite(mar, changes)
    with pytest.raises(ArchiveError, match=words):
        verify(mar)
    with pytest.raises(ArchiveError, match="but its manifest"):
        check_digest(mar)


def test_bytes_behind_the_archive_are_noticed(mar: Path) -> None:
    with open(mar, "ab") as file:
        file.write(b"appended")
    with pytest.raises(ArchiveError, match="but its manifest"):
        verify(mar)


def test_names_that_lead_out_of_the_archive_are_refused(mar: Path) -> None:
    with zipfile.ZipFile(mar, "a") as archive:
        archive.writestr("../../evil.py", "import os")
    with pytest.raises(ArchiveError, match=r"evil\.py.*do not unpack"):
        describe(mar)


def test_weights_that_are_not_the_cards_are_refused(tmp_path: Path, real_mar: Path) -> None:
    mar = Path(shutil.copy(real_mar, tmp_path / "pets.mar"))
    with zipfile.ZipFile(mar) as archive:
        card = json.loads(archive.read("model_cat_dog_conv_net.json"))
    card["weights_sha256"] = "0" * 64
    rewrite(mar, {"model_cat_dog_conv_net.json": json.dumps(card).encode()})
    write_manifest(mar)
    with pytest.raises(ArchiveError, match="the weights have sha256"):
        verify(mar)


def test_a_server_refuses_an_archive_that_is_not_its_manifests(mar: Path) -> None:
    assert find_archives([], mar.parent) == {"echo": "echo.mar"}
    rewrite(mar, {"handler.py": b"import os"})
    with pytest.raises(ArchiveError, match=r"echo\.mar has sha256"):
        find_archives([], mar.parent)
    manifest_path(mar).unlink()
    assert find_archives([], mar.parent) == {"echo": "echo.mar"}


def test_a_broken_manifest_is_told(mar: Path) -> None:
    manifest_path(mar).write_text("{}", encoding="utf-8")
    with pytest.raises(ArchiveError, match="is no manifest of an archive"):
        verify(mar)


@needs_ssh_keygen
def test_a_signature_names_its_signer_and_nobody_else(mar: Path, tmp_path: Path) -> None:
    (key, line), (other, other_line) = key_pair(tmp_path, "ada"), key_pair(tmp_path, "eve")
    signers = tmp_path / "allowed_signers"
    signers.write_text(line, encoding="utf-8")
    with pytest.raises(ArchiveError, match="is not signed"):
        check_signature(mar, signers)
    sign(mar, key)
    assert check_signature(mar, signers) == "ada@example.org"
    sign(mar, other)
    with pytest.raises(ArchiveError, match="was made by none"):
        check_signature(mar, signers)
    signers.write_text(line + other_line, encoding="utf-8")
    assert check_signature(mar, signers) == "eve@example.org"


@needs_ssh_keygen
def test_a_manifest_changed_after_signing_is_refused(mar: Path, tmp_path: Path) -> None:
    key, line = key_pair(tmp_path, "ada")
    signers = tmp_path / "allowed_signers"
    signers.write_text(line, encoding="utf-8")
    signature = sign(mar, key).read_bytes()
    rewrite(mar, {"handler.py": b"import os"})
    write_manifest(mar)
    assert not signature_path(mar).exists()
    signature_path(mar).write_bytes(signature)
    with pytest.raises(ArchiveError, match=r"not what ada@example\.org signed"):
        check_signature(mar, signers)


@needs_ssh_keygen
def test_no_key_is_misuse(mar: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no key at"):
        sign(mar, tmp_path / "none")


def test_scripts_archive_verify_tells_and_fails(mar: Path) -> None:
    words = [sys.executable, str(ROOT / "scripts" / "archive"), "verify", str(mar)]
    good = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (good.returncode, "echo@1.0" in good.stdout) == (0, True), good.stderr
    rewrite(mar, {"handler.py": b"import os"})
    bad = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert bad.returncode == 1
    assert "handler.py is another" in bad.stderr
