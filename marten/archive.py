"""From a trained model to the .mar that TorchServe loads: what goes in, the command that would do it, the file.

An archive holds, flat: <arch>.py, model_<x>.pth and its card model_<x>.json, image_classifier.py, modelspec.py,
protocols.py, engines.py, explain.py, telemetry.py, index_to_name.json, model-config.yaml and MAR-INF/MANIFEST.json. The
same model gives the same bytes at every build.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from marten.answer_check import check_answers
from marten.architectures import architecture_file, member_files
from marten.archive_check import check_config, check_name, check_sources
from marten.errors import ArchiveError, CardError
from marten.files import MODEL_STORE, MODELS, ROOT, replacing, write_text
from modelspec import ModelCard, check_labels, sha256_file

HANDLER = ROOT / "handlers" / "image_classifier.py"
CONTRACT = ROOT / "modelspec.py"
TRAVELLING = [ROOT / name for name in ("protocols.py", "engines.py", "explain.py", "telemetry.py")]
MODEL_CONFIG = ROOT / "deployment" / "model-config.yaml"
PARTS = ROOT / "deployment" / "parts"
"""Where an index_to_name.json is written for a model whose labels are not those of models/index_to_name.json."""

_MANIFEST = "MAR-INF/MANIFEST.json"
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Archive:
    """What one .mar is made of; every path exists once `plan_archive` returned it.

    Attributes:
        name: of the endpoint, /predictions/<name>, and of the file, <name>.mar.
        version: as TorchServe lists it.
        card: the model card.
        weights: the state dict; its card lies beside it.
        network: models/<arch>/<arch>.py.
        labels: an index_to_name.json that agrees with the card.
        config: the model-config.yaml that travels along.
        export_path: folder the .mar is put into.
    """

    name: str
    version: str
    card: ModelCard
    weights: Path
    network: Path
    labels: Path
    config: Path
    export_path: Path

    @property
    def mar(self) -> Path:
        """Path of the archive."""
        return self.export_path / f"{self.name}.mar"

    @property
    def extra_files(self) -> list[Path]:
        """What is needed beside the network, its weights, the handler and the configuration."""
        members = member_files(self.card.spec.arch_args)
        return [CONTRACT, *TRAVELLING, *members, self.weights.with_suffix(".json"), self.labels]

    def command(self, export_path: Path | None = None) -> list[str]:
        """The torch-model-archiver command with the same contents, as words, paths as seen from here."""
        return [
            "torch-model-archiver",
            *("--model-name", self.name),
            *("--version", self.version),
            *("--model-file", _near(self.network)),
            *("--serialized-file", _near(self.weights)),
            *("--handler", _near(HANDLER)),
            *("--extra-files", ",".join(_near(path) for path in self.extra_files)),
            *("--config-file", _near(self.config)),
            *("--export-path", _near(export_path or self.export_path)),
        ]

    def command_text(self) -> str:
        """The command for a terminal, one flag per line; --force because it may replace an older archive."""
        words = [shlex.quote(word) for word in [*self.command(), "--force"]]
        return " ".join(words).replace(" --", " \\\n    --")


def find_models() -> list[Path]:
    """Weights in models/ that have a card beside them, sorted.

    Raises:
        ArchiveError: there are none.
    """
    found = [path for path in sorted(MODELS.glob("model_*.pth")) if path.with_suffix(".json").is_file()]
    if not found:
        raise ArchiveError(
            f"no trained model in {MODELS}: train one, for instance with "
            "train_main.py --conv_net base_cnn --data_dir DATA --model_path models/model_base_cnn.pth"
        )
    return found


def plan_archive(
    weights: Path,
    name: str | None = None,
    version: str | None = None,
    export_path: Path = MODEL_STORE,
    config: Path = MODEL_CONFIG,
    parts: Path = PARTS,
) -> Archive:
    """Gather what goes into an archive and check everything that can be known before it is built.

    Writes nothing but `parts`/<name>/index_to_name.json, and only where models/index_to_name.json has other labels.

    Args:
        weights: the .pth that training saved, its card beside it.
        name: of the endpoint; the card's by default.
        version: the card's by default.
        export_path: folder for the .mar.
        config: the model-config.yaml to pack.
        parts: folder for a generated index_to_name.json.

    Raises:
        MartenError: naming what TorchServe could not load, or would load wrongly.
    """
    weights = Path(weights)
    if weights.suffix != ".pth":
        raise ArchiveError(f"{weights} is no .pth: give the state dict that training saved, not its card or archive")
    card = ModelCard.read(weights.with_suffix(".json"))
    if not weights.is_file():
        raise CardError(f"the card {weights.with_suffix('.json')} has no weights beside it: there is no {weights}")
    found = sha256_file(weights)
    if found != card.weights_sha256:
        raise CardError(
            f"{weights} has sha256 {found}, but its card says {card.weights_sha256}: one of the two was changed "
            "or comes from another run. Train again, or fetch both from the same place."
        )
    name = name or card.spec.name
    check_name(name)
    archive = Archive(
        name=name,
        version=version or card.spec.version,
        card=card,
        weights=weights,
        network=architecture_file(card.spec.arch),
        labels=_labels_file(card, parts / name),
        config=Path(config),
        export_path=Path(export_path),
    )
    check_sources(
        [archive.network, HANDLER, *member_files(card.spec.arch_args)],
        [CONTRACT, *TRAVELLING],
        [archive.weights, archive.config, *archive.extra_files],
    )
    check_config(archive.config)
    return archive


def write_archive(archive: Archive) -> float:
    """Build the .mar, load it as TorchServe would, and put it in place only if it answers as its model does.

    Returns:
        The largest difference between an answer of the archive and of the state dict; 0 when they are equal.

    Raises:
        ArchiveError: the archiver failed, the archive does not load, or it answers otherwise. An archive that was
            there before is then untouched.
    """
    with replacing(archive.mar) as neighbour, tempfile.TemporaryDirectory(prefix="marten-archive-") as private:
        folder = _run_archiver(archive, Path(private))
        _write_zip(folder, neighbour, _created_on(archive.card))
        unpacked = Path(private) / "unpacked"
        with zipfile.ZipFile(neighbour) as written:
            written.extractall(unpacked)
        return check_answers(unpacked, archive.card.spec, archive.weights)


def _labels_file(card: ModelCard, folder: Path) -> Path:
    """Give models/index_to_name.json where it agrees with the card, else one generated in `folder`."""
    labels = card.spec.labels
    shared = MODELS / "index_to_name.json"
    try:
        check_labels(labels, json.loads(shared.read_text(encoding="utf-8")), shared)
        return shared
    except (CardError, OSError, ValueError):
        generated = folder / "index_to_name.json"
        text = json.dumps({str(i): label for i, label in enumerate(labels)}, ensure_ascii=False) + "\n"
        if not generated.is_file() or generated.read_text(encoding="utf-8") != text:
            write_text(generated, text)
        return generated


def _run_archiver(archive: Archive, private: Path) -> Path:
    """Let torch-model-archiver lay out the archive's folder, under a temporary directory of its own.

    It empties <tmp>/<name> before it begins, so two of them on one machine would take each other's files.
    """
    (private / "scratch").mkdir()
    command = [sys.executable, "-m", "model_archiver.model_packaging", *archive.command(private)[1:]]
    done = subprocess.run(
        [*command, "--archive-format", "no-archive"],
        env={**os.environ, "TMPDIR": str(private / "scratch")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ArchiveError(f"torch-model-archiver failed: {reason}. Its command was: {shlex.join(command)}")
    return private / archive.name


def _write_zip(folder: Path, path: Path, created_on: str) -> None:
    """Zip a folder so that equal contents give equal bytes: sorted, stored, undated, whatever the machine."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as zipped:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            member = zipfile.ZipInfo(file.relative_to(folder).as_posix(), _FIRST_DATE)
            member.create_system = 3
            member.external_attr = 0o100644 << 16
            data = file.read_bytes()
            if member.filename == _MANIFEST:
                manifest = {**json.loads(data), "createdOn": created_on}
                data = json.dumps(manifest, indent=2).encode()
            zipped.writestr(member, data)


def _created_on(card: ModelCard) -> str:
    """The day the model was trained, as the archiver spells dates; its first day for a card without one."""
    try:
        date = datetime.fromisoformat(str(card.provenance.get("created")))
    except ValueError:
        date = datetime(*_FIRST_DATE)
    return date.strftime("%d/%m/%Y %H:%M:%S")


def _near(path: Path) -> str:
    """A path relative to the working directory where it lies below it, else absolute."""
    absolute, here = path.resolve(), Path.cwd().resolve()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)
