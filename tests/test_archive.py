"""Archives: the same bytes at every build, the plain archiver's files, and never one that answers otherwise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from handlers import image_classifier
from marten import archive as archiving
from marten.answer_check import answer_distance, ask_archive, check_answers, expected_outputs, golden_pictures
from marten.architectures import known_architectures
from marten.archive import MODEL_CONFIG, Archive, plan_archive, write_archive
from marten.archive_check import check_config, check_name, check_sources
from marten.errors import ArchiveError, CardError, MartenError, TrainingError
from modelspec import ModelSpec, sha256_file
from tests.conftest import ROOT
from tests.pictures import odd_pictures

FILES = [
    "MAR-INF/MANIFEST.json",
    "cat_dog_conv_net.py",
    "engines.py",
    "explain.py",
    "image_classifier.py",
    "index_to_name.json",
    "model-config.yaml",
    "model_cat_dog_conv_net.json",
    "model_cat_dog_conv_net.pth",
    "modelspec.py",
    "protocols.py",
    "telemetry.py",
]


@pytest.fixture(scope="module")
def built(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """One archive, already written."""
    archive = plan_archive(tiny_model(), export_path=tmp_path_factory.mktemp("store"))
    assert write_archive(archive) <= 1e-5
    return archive


def contents(mar: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(mar) as zipped:
        return {name: zipped.read(name) for name in sorted(zipped.namelist())}


def planned(weights: Path, tmp_path: Path, **options: Any) -> Archive:
    return plan_archive(weights, export_path=tmp_path / "store", parts=tmp_path / "parts", **options)


def scripts_archive(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "archive"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


# -------------------------------------------------------------------------------------------------------- contents


def test_an_archive_holds_what_the_handler_needs_and_nothing_else(built: Archive) -> None:
    found = contents(built.mar)
    assert list(found) == FILES
    manifest = json.loads(found["MAR-INF/MANIFEST.json"])
    assert manifest["createdOn"] == "06/05/2024 07:08:09"
    assert manifest["model"] == {
        "modelName": "cat_dog_conv_net",
        "serializedFile": "model_cat_dog_conv_net.pth",
        "handler": "image_classifier.py",
        "modelFile": "cat_dog_conv_net.py",
        "modelVersion": "1.0",
        "configFile": "model-config.yaml",
    }
    assert found["modelspec.py"] == (ROOT / "modelspec.py").read_bytes()
    assert found["model-config.yaml"] == MODEL_CONFIG.read_bytes()


def test_rebuilding_gives_the_same_bytes(built: Archive, tmp_path: Path) -> None:
    os.utime(built.weights, (1e9, 1e9))
    again = plan_archive(built.weights, export_path=tmp_path)
    write_archive(again)
    assert again.mar.read_bytes() == built.mar.read_bytes()


def test_the_printed_command_packs_the_same_files(built: Archive, tmp_path: Path) -> None:
    by_hand = plan_archive(built.weights, export_path=tmp_path / "by hand")
    by_hand.export_path.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "TMPDIR": str(tmp_path)}
    subprocess.run(by_hand.command_text(), shell=True, check=True, capture_output=True, env=env)
    ours, theirs = contents(built.mar), contents(by_hand.mar)
    ours_manifest, theirs_manifest = (json.loads(found.pop("MAR-INF/MANIFEST.json")) for found in (ours, theirs))
    assert theirs == ours
    assert theirs_manifest.pop("createdOn") != ours_manifest.pop("createdOn")
    assert theirs_manifest == ours_manifest


def test_name_and_version_are_the_cards_unless_given(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    weights = tiny_model(name="pets", version="3.1")
    assert planned(weights, tmp_path).mar == tmp_path / "store" / "pets.mar"
    assert planned(weights, tmp_path).version == "3.1"
    renamed = planned(weights, tmp_path, name="cats", version="4")
    assert (renamed.mar.name, renamed.version) == ("cats.mar", "4")


def test_other_labels_get_a_file_of_their_own(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    assert planned(tiny_model(), tmp_path).labels == ROOT / "models" / "index_to_name.json"
    foxes = planned(tiny_model(labels=("fox", "löwe", "owl")), tmp_path, name="wild")
    assert foxes.labels == tmp_path / "parts" / "wild" / "index_to_name.json"
    assert json.loads(foxes.labels.read_text(encoding="utf-8")) == {"0": "fox", "1": "löwe", "2": "owl"}
    scores = planned(tiny_model(labels=(), outputs=1, task="regression"), tmp_path, name="scores")
    assert json.loads(scores.labels.read_text(encoding="utf-8")) == {}


SPECIAL = {
    "resnet18": {"topk": 3, "labels": ("fox", "löwe", "owl")},
    "efficientnet_lite0": {"mirror": True, "temperature": 1.7},
    "cat_dog_conv_net": {"task": "embedding", "labels": (), "outputs": 4},
}
NETWORKS = sorted(
    min((name for name, net in known_architectures().items() if net.arch == arch), key=lambda name: (len(name), name))
    for arch in {net.arch for net in known_architectures().values()}
)
"""The smallest of each file."""


@pytest.mark.parametrize("conv_net", NETWORKS)
def test_every_network_is_packed_and_answers_as_its_state_dict(
    tiny_model: Callable[..., Path], tmp_path: Path, conv_net: str
) -> None:
    archive = planned(tiny_model(conv_net, **SPECIAL.get(conv_net, {})), tmp_path)
    assert write_archive(archive) <= 3e-5  # fp32's own rounding in the deepest of them
    assert archive.network.name in contents(archive.mar)


def test_odd_pictures_are_answered_as_the_state_dict_answers(built: Archive, unpack: Callable[[Path], Path]) -> None:
    spec, pictures = built.card.spec, odd_pictures(7)
    replies = ask_archive(unpack(built.mar), list(pictures.values()))["replies"]
    wanted = spec.answers(expected_outputs(spec, built.weights, list(pictures.values())), topk=len(spec.labels))
    for name, reply, expected in zip(pictures, replies, wanted, strict=True):
        assert reply["code"] == 200, name
        assert answer_distance(reply["body"], expected, spec) <= 1e-5, name


# ----------------------------------------------------------------------------------------- archives that disagree


REFUSAL = "            return error\n"


@pytest.mark.parametrize(
    ("part", "old", "new", "said"),
    [
        ("CONTRACT", ".div_(255.0)", ".div_(256.0)", "must not be served"),
        ("CONTRACT", "_upright(opened)", "opened", "must not be served"),
        ("HANDLER", "self.spec.answers(logits_NK)", "self.spec.answers(-logits_NK)", "must not be served"),
        ("HANDLER", REFUSAL, REFUSAL.replace("error", "{}"), "broken picture"),
        (
            "HANDLER",
            "import modelspec\n",
            "import modelspec\nimport marten\n",
            "No module named 'marten'",
        ),
        ("HANDLER", "self._warm_up()", "self._warm_down()", "_warm_down"),
    ],
)
def test_an_archive_that_answers_otherwise_is_not_put_in_place(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    old: str,
    new: str,
    said: str,
) -> None:
    source: Path = getattr(archiving, part)
    text = source.read_text(encoding="utf-8")
    assert old in text
    (tmp_path / source.name).write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(archiving, part, tmp_path / source.name)
    archive = planned(tiny_model(), tmp_path)
    archive.mar.parent.mkdir()
    archive.mar.write_bytes(b"the good one")
    with pytest.raises(ArchiveError, match=said):
        write_archive(archive)
    assert archive.mar.read_bytes() == b"the good one"
    assert list(archive.mar.parent.iterdir()) == [archive.mar]


def test_rounded_weights_are_noticed(built: Archive, unpack: Callable[[Path], Path], tmp_path: Path) -> None:
    state = torch.load(built.weights, weights_only=True)
    torch.save({key: value.bfloat16().float() for key, value in state.items()}, tmp_path / built.weights.name)
    with pytest.raises(ArchiveError, match="must not be served"):
        check_answers(unpack(built.mar), built.card.spec, tmp_path / built.weights.name)


def test_a_saturated_softmax_hides_nothing(tiny_model: Callable[..., Path], tmp_path: Path, unpack: Any) -> None:
    archive = planned(tiny_model(temperature=1e-6), tmp_path)
    write_archive(archive)
    folder = unpack(archive.mar)
    contract = (folder / "modelspec.py").read_text(encoding="utf-8")
    (folder / "modelspec.py").write_text(contract.replace(".div_(255.0)", ".div_(255.1)"), encoding="utf-8")
    with pytest.raises(ArchiveError, match="must not be served"):
        check_answers(folder, archive.card.spec, archive.weights)


def test_golden_pictures_are_the_same_at_every_call() -> None:
    assert golden_pictures() == golden_pictures()
    assert golden_pictures(1) != golden_pictures()


def test_the_distance_of_answers_sees_labels_order_and_numbers() -> None:
    spec = ModelSpec("m", "a", ("cat", "dog", "fox"), topk=1)
    full = {"cat": 0.5, "dog": 0.4, "fox": 0.1}
    assert answer_distance({"cat": 0.5}, full, spec) == 0
    assert answer_distance({"cat": 0.45}, full, spec) == pytest.approx(0.05)
    assert answer_distance({"dog": 0.4}, full, spec) == pytest.approx(0.1)
    assert answer_distance({"owl": 0.5}, full, spec) > 1
    assert answer_distance({"cat": 0.5, "dog": 0.4}, full, spec) > 1
    assert answer_distance({}, full, spec) > 1
    even = {"cat": 0.45, "dog": 0.45, "fox": 0.1}
    assert answer_distance({"dog": 0.45}, even, spec) == answer_distance({"cat": 0.45}, even, spec) == 0
    vector = ModelSpec("m", "a", task="embedding")
    assert answer_distance({"embedding": [1.0, 200.0]}, {"embedding": [1.0, 100.0]}, vector) == 1
    assert answer_distance({"embedding": [1.0]}, {"embedding": [1.0, 2.0]}, vector) > 1
    assert answer_distance({"embedding": [float("nan")]}, {"embedding": [1.0]}, vector) > 1


# -------------------------------------------------------------------------------------- what is refused beforehand

MODEL = "class Net:\n    pass\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MODEL + "class Error(Exception):\n    pass\n", "exactly one class, found Net, Error"),
        ("def forward(x):\n    return x\n", "exactly one class, found none"),
        (
            MODEL + "def f(x):\n    match x:\n        case 1:\n            return 2\n",
            r"is not Python 3\.9: Pattern matching",
        ),
        (MODEL + "def f(x: int | None) -> None:\n    pass\n", r"cannot evaluate `int \| None`"),
        (MODEL + "def f(x) -> list[int] | None:\n    pass\n", "from __future__ import annotations"),
        (MODEL + "x: int | None = None\n", "cannot evaluate"),
        (MODEL + "def f(:\n", "is not Python"),
    ],
)
def test_sources_that_torchserve_could_not_load_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "net.py").write_text(text, encoding="utf-8")
    with pytest.raises(ArchiveError, match=said):
        check_sources([tmp_path / "net.py"], [], [])


def test_a_file_that_is_fine_is_not_refused(tmp_path: Path) -> None:
    text = "from __future__ import annotations\n" + MODEL + "def f(x: int | None) -> list[int] | None:\n    pass\n"
    (tmp_path / "net.py").write_text(text, encoding="utf-8")
    check_sources([tmp_path / "net.py"], [], [])


def test_files_that_cannot_lie_side_by_side_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b", "a,b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").touch()
    check_sources([], [], [tmp_path / "a" / "x.json"])
    with pytest.raises(ArchiveError, match=r"two files of the archive are called x\.json"):
        check_sources([], [], [tmp_path / "a" / "x.json", tmp_path / "b" / "x.json"])
    with pytest.raises(ArchiveError, match=r"take .* apart"):
        check_sources([], [], [tmp_path / "a,b" / "x.json"])
    with pytest.raises(ArchiveError, match="there is no"):
        check_sources([], [], [tmp_path / "c" / "x.json"])


@pytest.mark.parametrize("name", ["", ".mar", "-x", "a b", "a/b", "..", "ä", "a\n"])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(ArchiveError, match="--name"):
        check_name(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_size: 8\nresponseTimeout: 9", "ignores the unknown key 'batch_size'"),
        ("batchSize: '8'\nresponseTimeout: 9", "must be of type int, found '8'"),
        ("useVenv: 1\nresponseTimeout: 9", "must be of type bool"),
        ("batchSize: true\nresponseTimeout: 9", "must be of type int"),
        ("maxBatchDelay: -1\nresponseTimeout: 9", "must not be negative"),
        ("batchSize: 8", "waits 120 s"),
        ("- batchSize", "keys and values"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_configuration_that_torchserve_would_ignore_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ArchiveError, match=said):
        check_config(tmp_path / "c.yaml")


def test_our_own_configuration_is_read_by_torchserve() -> None:
    check_config(MODEL_CONFIG)
    assert yaml.safe_load(MODEL_CONFIG.read_text(encoding="utf-8"))["handler"] == image_classifier.SETTINGS


def test_the_fast_configuration_differs_in_its_precision_alone() -> None:
    fast = MODEL_CONFIG.with_name("model-config-fast.yaml")
    check_config(fast)
    plain, quick = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in (MODEL_CONFIG, fast))
    assert (plain["handler"].pop("precision"), quick["handler"].pop("precision")) == ("fp32", "auto")
    assert quick == plain


def spoil_card(folder: Path, **spec: Any) -> None:
    path = folder / "model_cat_dog_conv_net.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["spec"].update(spec)
    path.write_text(json.dumps(raw), encoding="utf-8")


def spoil_weights(folder: Path, state: Any) -> None:
    path = folder / "model_cat_dog_conv_net.pth"
    torch.save(state, path)
    raw = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    path.with_suffix(".json").write_text(json.dumps({**raw, "weights_sha256": sha256_file(path)}), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda folder: (folder / "model_cat_dog_conv_net.json").unlink(), CardError, "no model card"),
        (lambda folder: (folder / "model_cat_dog_conv_net.pth").unlink(), CardError, "no weights beside"),
        (lambda folder: (folder / "model_cat_dog_conv_net.pth").write_bytes(b"x"), CardError, "its card says"),
        (lambda folder: spoil_card(folder, arch="unheard_of"), TrainingError, "unheard_of"),
        (lambda folder: spoil_card(folder, arch_args={"depth": 3}), MartenError, "depth"),
        (lambda folder: spoil_card(folder, arch_args={"num_classes": 5}), MartenError, "does not fit .* size mismatch"),
        (lambda folder: spoil_weights(folder, {"model": {}, "epoch": 3}), MartenError, "no bare state dict"),
        (lambda folder: spoil_weights(folder, {"a": torch.zeros(1)}), MartenError, "does not fit"),
    ],
)
def test_a_model_that_cannot_be_served_is_told_by_name(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    spoil: Callable[[Path], Any],
    error: type[Exception],
    said: str,
) -> None:
    weights = tiny_model()
    for path in (weights, weights.with_suffix(".json")):
        shutil.copy(path, tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=said):
        write_archive(planned(tmp_path / weights.name, tmp_path))
    assert not (tmp_path / "store" / "cat_dog_conv_net.mar").exists()


# -------------------------------------------------------------------------------------------------------- command


def test_the_command_packs_and_says_what_it_did(tmp_path: Path, built: Archive) -> None:
    done = scripts_archive("--model_path", built.weights, "--export-path", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch-model-archiver" in done.stdout
    assert sha256_file(built.mar)[:16] in done.stdout
    assert (tmp_path / "cat_dog_conv_net.mar").read_bytes() == built.mar.read_bytes()


def test_a_dry_run_writes_no_archive(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    done = scripts_archive("--model_path", tiny_model(), "--export_path", tmp_path / "store", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "--model-name cat_dog_conv_net" in done.stdout
    assert not (tmp_path / "store").exists()


def test_misuse_and_failure_are_one_line_each(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    twice = scripts_archive("--model_path", tiny_model(), tiny_model(), "--name", "x", "--dry_run")
    assert (twice.returncode, twice.stderr.count("\n")) == (2, 1)
    missing = scripts_archive("--model_path", tmp_path / "model_x.pth")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "no model card" in missing.stderr
    card = scripts_archive("--model_path", tiny_model().with_suffix(".json"))
    assert (card.returncode, card.stderr.count("\n")) == (1, 1)


# ---------------------------------------------------------------------------------------- Python 3.9 and torch 2.4


@pytest.mark.parametrize(
    "part",
    [
        "modelspec.py",
        "protocols.py",
        "engines.py",
        "explain.py",
        "telemetry.py",
        "handlers",
        "models",
        "marten/archive_probe.py",
    ],
)
def test_what_travels_needs_no_python_newer_than_3_9(part: str) -> None:
    vermin = [sys.executable, "-c", "from vermin import main; main()", "-t=3.9-", "--violations", "--eval-annotations"]
    command = [*vermin, "--no-tips", str(ROOT / part)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("conv_net", NETWORKS)
def test_an_archive_answers_the_same_under_the_official_images_python(
    tiny_model: Callable[..., Path], tmp_path: Path, unpack: Callable[[Path], Path], conv_net: str
) -> None:
    python = os.environ.get("MARTEN_PYTHON39")
    if not python:
        pytest.skip(
            "set MARTEN_PYTHON39 to a Python 3.9 with torch==2.4.1 torchvision==0.19.1 torchserve==0.12.0 captum pyyaml"
        )
    versions = "import sys, torch; print(sys.version_info[:2], torch.__version__)"
    told = subprocess.run([python, "-c", versions], capture_output=True, text=True, check=True).stdout
    assert told.startswith("(3, 9) 2.4."), told
    archive = planned(tiny_model(conv_net), tmp_path)
    write_archive(archive)
    folder = unpack(archive.mar)
    assert check_answers(folder, archive.card.spec, archive.weights, python) <= 3e-5
    if conv_net == "cat_dog_conv_net":
        older = ("avif", "tiff_ycbcr")  # not in every Pillow; refused by Pillow 11
        pictures = [data for name, data in odd_pictures(3).items() if not name.startswith(older)]
        theirs, ours = (ask_archive(folder, pictures, which)["replies"] for which in (python, sys.executable))
        assert {reply["code"] for reply in theirs} == {200}
        assert max(_gap(a["body"], b["body"]) for a, b in zip(theirs, ours, strict=True)) < 1e-4


def _gap(a: dict[str, float], b: dict[str, float]) -> float:
    return max(abs(a.get(key, 0) - b.get(key, 0)) for key in a.keys() | b.keys())
