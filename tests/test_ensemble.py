"""Several models as one: the mean of their answers, as one archive that TorchServe's loader takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engines import choose_engine, drawn_pixels
from marten.answer_check import ask_archive
from marten.archive import plan_archive, write_archive
from marten.ensemble import make_ensemble
from marten.errors import UsageError
from marten.evaluate import pictures_to_ask
from marten.predict import predict
from marten.weights import load_model
from modelspec import ModelCard
from tests.pictures import odd_pictures
from tests.runs import run_once

Models = Callable[..., Path]


@pytest.fixture
def members(tiny_model: Models) -> list[Path]:
    """Two architectures, three models, one of them calibrated and mirrored."""
    preprocess = load_model(tiny_model())[1].spec.preprocess
    return [
        tiny_model(),
        tiny_model(seed=1, temperature=1.7, mirror=True),
        tiny_model("base_cnn", preprocess=preprocess),
    ]


def test_an_ensemble_answers_with_the_mean_of_its_members_answers(members: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "model_ensemble.pth"
    make_ensemble(members, output, "pets")
    network, card = load_model(output)
    assert (card.spec.name, card.spec.labels) == ("pets", ("cat", "dog"))
    images_NCHW = card.spec.preprocess.normalize(drawn_pixels((224, 224)))
    with torch.inference_mode():
        told = card.spec.probabilities(card.spec.logits(network, images_NCHW))
        each = []
        for path in members:
            one, own = load_model(path)
            each.append(own.spec.probabilities(own.spec.logits(one, images_NCHW)))
    torch.testing.assert_close(told, torch.stack(each).mean(0), atol=1e-6, rtol=0)
    assert (each[0] - each[1]).abs().max() > 1e-3, "members that answer alike show nothing"


def test_a_regressions_ensemble_gives_the_mean_score(tiny_model: Models, tmp_path: Path) -> None:
    kind = {"task": "regression", "labels": (), "outputs": 1}
    members = [tiny_model(**kind, score_scale=2.0, score_offset=5.0), tiny_model(seed=1, **kind, score_offset=1.0)]
    make_ensemble(members, tmp_path / "model_e.pth")
    picture = tmp_path / "picture.png"
    picture.write_bytes(next(data for name, data in odd_pictures().items() if "png" in name))

    def score(path: Path) -> float:
        network, card = load_model(path)
        (told,) = predict(network, card.spec, [picture])
        assert told.answer is not None
        return float(told.answer["score"])

    assert score(tmp_path / "model_e.pth") == pytest.approx((score(members[0]) + score(members[1])) / 2, abs=1e-4)


def test_it_is_one_archive_that_holds_every_members_file_and_answers(
    members: list[Path], tmp_path: Path, unpack: Callable[[Path], Path]
) -> None:
    output = tmp_path / "model_ensemble.pth"
    make_ensemble(members, output, "pets")
    archive = plan_archive(output, export_path=tmp_path / "store", parts=tmp_path / "parts")
    assert write_archive(archive) <= 1e-5
    folder = unpack(archive.mar)
    assert {"ensemble.py", "cat_dog_conv_net.py", "base_cnn.py"} <= {path.name for path in folder.iterdir()}
    pictures = list(odd_pictures(5).values())
    replies = ask_archive(folder, pictures)["replies"]
    network, card = load_model(output)
    for data, reply in zip(pictures, replies, strict=True):
        with torch.inference_mode():
            (wanted,) = card.spec.answers(card.spec.logits(network, card.spec.preprocess(data)))
        assert reply["code"] == 200
        assert reply["body"] == {label: pytest.approx(p, abs=1e-5) for label, p in wanted.items()}


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_fast_engines_take_it(members: list[Path], tmp_path: Path, engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino", reason="needs the package openvino")
    make_ensemble(members, tmp_path / "model_e.pth")
    network, card = load_model(tmp_path / "model_e.pth")
    settings = {"precision": "fp32", "engine": "auto" if engine == "openvino" else engine}
    _, told = choose_engine(network, card.spec, settings, torch.device("cpu"), 1)
    assert told.startswith(f"engine {engine} fp32")


def test_models_that_do_not_belong_together_are_refused(tiny_model: Models, tmp_path: Path) -> None:
    one = tiny_model()
    with pytest.raises(UsageError, match="two models or more, found 1"):
        make_ensemble([one], tmp_path / "e.pth")
    with pytest.raises(UsageError, match="differ in labels"):
        make_ensemble([one, tiny_model(labels=("dog", "cat"))], tmp_path / "e.pth")
    with pytest.raises(UsageError, match="differ in preprocess"):
        make_ensemble([one, tiny_model("base_cnn")], tmp_path / "e.pth")
    make_ensemble([one, one], tmp_path / "e.pth")
    with pytest.raises(UsageError, match="it cannot be a member"):
        make_ensemble([one, tmp_path / "e.pth"], tmp_path / "f.pth")
    assert not (tmp_path / "f.pth").exists()


def test_it_is_judged_by_pictures_that_all_of_them_held_out(drawn_set: Path, whole_run: Path, tmp_path: Path) -> None:
    own = whole_run / "model.pth"
    for folder, changes in (("again", {"lr": (2e-3,)}), ("apart", {"seed": 1})):
        assert run_once(drawn_set, tmp_path / folder, epochs=1, **changes) == 0
    make_ensemble([own, tmp_path / "again" / "model.pth"], tmp_path / "e.pth")
    card = ModelCard.read(tmp_path / "e.json")
    held_out, part = pictures_to_ask(card, drawn_set)
    wanted, _ = pictures_to_ask(ModelCard.read(own.with_suffix(".json")), drawn_set)
    assert part == "validation"
    assert [s.id for s in held_out.samples] == [s.id for s in wanted.samples]
    assert [one["training"]["lr"] for one in card.training["members"]] == [[1e-3], [2e-3]]
    make_ensemble([own, tmp_path / "apart" / "model.pth"], tmp_path / "f.pth")
    assert ModelCard.read(tmp_path / "f.json").data == {}


def test_the_sweeps_best_become_one_model(whole_run: Path, tmp_path: Path) -> None:
    from tests.test_sweep import sweep

    folder = tmp_path / "out"
    for name in ("1", "2", "3"):
        shutil.copytree(whole_run / "model.run", folder / f"model_{name}.run")
        for end in ("pth", "json"):
            shutil.copy(whole_run / f"model.{end}", folder / f"model_{name}.{end}")
    (folder / "runs.txt").write_text("".join(f"--lr {n} --model_path out/model_{n}.pth\n" for n in "123"))
    metrics = folder / "model_2.run" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps({**row, "validation_loss": 9.0}) + "\n" for row in rows))
    done = sweep("ensemble", "--folder", "out", "--best", "2", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "out/model_ensemble.pth\n")
    assert done.stderr == "members: model_1.pth, model_3.pth\n"
    assert ModelCard.read(folder / "model_ensemble.json").spec.arch == "ensemble"
    few = sweep("ensemble", "--folder", "out", "--best", "4", folder=tmp_path)
    assert few.returncode == 1
    assert "only 3 of the 3 runs have finished, 4 are asked for" in few.stderr
