"""A run trains, keeps its best, and says in one line what it cannot work with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from marten.errors import DONE, DataError, TrainingError, UsageError
from marten.files import ROOT
from marten.runlog import counts_line
from marten.settings import Settings
from marten.weights import load_model
from modelspec import ModelCard, load_state_dict
from tests.pictures import draw, encode
from tests.runs import draw_set, run_once


def test_a_run_leaves_weights_card_metrics_curves_and_split(whole_run: Path, drawn_set: Path) -> None:
    card = ModelCard.read(whole_run / "model.json")
    assert card.spec.labels == ("cat", "dog")
    assert card.spec.arch_args == {"num_classes": 2, "dropout": 0.3}
    assert card.data["train"] == {"cat": 9, "dog": 9}
    accuracy = card.metrics["validation_accuracy"]
    assert accuracy["count"] == 6
    assert accuracy["interval_95"][0] <= accuracy["value"] <= accuracy["interval_95"][1]
    network, _ = load_model(whole_run / "model.pth")
    assert not network.training
    assert sorted(p.name for p in (whole_run / "model.run").iterdir()) == [
        "curves.png",
        "metrics.jsonl",
        "rates.csv",
        "split.csv",
        "timing.jsonl",
    ]
    rows = [json.loads(line) for line in (whole_run / "model.run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["train_count"] == 18 and row["validation_count"] == 6 for row in rows)
    assert len((whole_run / "model.run" / "split.csv").read_text().splitlines()) == 25


def test_a_run_without_validation_keeps_its_last_best(drawn_set: Path, tmp_path: Path) -> None:
    # B1-08: validation_split 0 crashed
    assert run_once(drawn_set, tmp_path, validation_split=0.0, epochs=1) == DONE
    assert ModelCard.read(tmp_path / "model.json").metrics == {}


def test_a_mirrored_run_learns_the_same_and_is_judged_and_served_by_both_views(drawn_set: Path, tmp_path: Path) -> None:
    plain, both = tmp_path / "plain", tmp_path / "both"
    assert [run_once(drawn_set, out, epochs=1, mirror=out == both) for out in (plain, both)] == [DONE, DONE]
    assert (plain / "model.pth").read_bytes() == (both / "model.pth").read_bytes()
    cards = [ModelCard.read(out / "model.json") for out in (plain, both)]
    assert [card.spec.mirror for card in cards] == [False, True]
    losses = [card.metrics["validation_loss"]["value"] for card in cards]
    assert losses[0] != losses[1]
    network, card = load_model(both / "model.pth")
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(card.spec.logits(network, images), card.spec.logits(network, images.flip(3)))


def test_a_frozen_backbone_stays_bit_for_bit(tmp_path: Path) -> None:
    from marten.architectures import find_architecture
    from marten.weights import packaged_weights

    flags = {"conv_net": "efficientnet_lite0", "freeze": "backbone", "epochs": 1, "ema": 0.0, "validation_split": 0.0}
    assert run_once(draw_set(tmp_path / "data", 4), tmp_path, **flags) == DONE
    published = load_state_dict(packaged_weights(find_architecture("efficientnet_lite0")))
    trained = load_state_dict(tmp_path / "model.pth")
    assert all(torch.equal(t, published[name]) for name, t in trained.items() if not name.startswith("_fc"))


def test_a_diverging_run_says_so(drawn_set: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="try a lower --lr"):
        run_once(drawn_set, tmp_path, lr=(1e18,), schedule="constant", epochs=3)


def test_weights_that_fit_nothing_are_refused(drawn_set: Path, tmp_path: Path, whole_run: Path) -> None:
    with pytest.raises(TrainingError, match="does not fit resnet18"):
        run_once(drawn_set, tmp_path, conv_net="resnet18", weights=str(whole_run / "model.pth"))


def test_imagenet_weights_out_of_reach_are_one_line(
    drawn_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # B1-05: the network's file downloaded 548 MB at every start
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", no_network)
    with pytest.raises(TrainingError, match=r"--weights FILE") as error:
        run_once(drawn_set, tmp_path, conv_net="resnet18")
    assert "\n" not in str(error.value)


def test_a_set_of_one_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat.1.jpg").write_bytes(encode(draw(1), "JPEG"))
    with pytest.raises(DataError, match="one class"):
        run_once(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--conv_net", "vgg91"], "did you mean vgg"),
        (["--betas", "0.9"], "expected 2 arguments"),
        (["--validation_split", "1"], "validation_split"),
        (["--batch-size", "0"], "batch_size"),
        (["--checkpoint_every", "soon"], "30min"),
        (["--momentum", "0.9"], "unrecognized"),
        (["--device", "tpu"], "auto, cpu, cuda, mps"),
    ],
)
def test_misuse_is_one_line_and_exit_2(drawn_set: Path, tmp_path: Path, words: list[str], told: str) -> None:
    # B1-07, B1-12
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_main.py"), "--data_dir", str(drawn_set), *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_config_file_sets_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from marten.settings import settings_from
    from train_main import build_parser

    config = tmp_path / "recipe.toml"
    config.write_text(
        'conv_net = "vgg"\nlr = [1e-3, 1e-4]\nbatch-size = 8\nself_checkpoint = true\ncheckpoint_every = 2\n'
    )
    settings = settings_from(build_parser().parse_args(["--batch-size", "5", "--config", str(config)]))
    assert (settings.conv_net, settings.lr, settings.batch_size, settings.self_checkpoint) == (
        "vgg",
        (1e-3, 1e-4),
        5,
        True,
    )
    for wrong in ("epoch = 3\n", 'self_checkpoint = "false"\n'):  # B2-02: "false" was true
        config.write_text(wrong)
        with pytest.raises(SystemExit):
            build_parser().parse_args(["--config", str(config)])


def test_no_short_flag_is_used_twice() -> None:
    # B0-06
    from train_main import build_parser

    strings = [word for action in build_parser()._actions for word in action.option_strings]
    assert len(strings) == len(set(strings))


def test_every_flag_is_told_in_words() -> None:
    # --epochs, --batch_size and others stood without a word
    from predict_main import build_parser as of_predict
    from train_main import build_parser as of_train

    for parser in (of_train(), of_predict()):
        assert [action.option_strings[-1] for action in parser._actions if not action.help] == []
        assert "(default: [" not in parser.format_help()  # Python's lists


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schedule": "polynomial"}, "constant, cosine"),
        ({"augment": "heavy"}, "none, flip"),
        ({"model_path": "models/"}, "ends in .pth"),
        ({"model_path": "models/vgg.json"}, "ends in .pth"),
        ({"checkpoint_every": "0", "self_checkpoint": True}, "at least 1"),
    ],
)
def test_a_wrong_word_is_told_before_a_picture_is_read(changes: dict[str, Any], told: str) -> None:
    # --schedule and --augment were looked at after 25,000 pictures; a --model_path of .json was overwritten by the card
    with pytest.raises(UsageError, match=told):
        Settings(**changes)


def test_a_class_of_one_picture_is_told(drawn_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(drawn_set, tmp_path / "data")
    (data / "fox.0.jpg").write_bytes(encode(draw(99, (60, 50)), "JPEG"))
    assert run_once(data, tmp_path, epochs=1) == DONE
    assert "Not validated, as they have one picture only: fox." in capsys.readouterr().out


def test_many_classes_fit_on_a_line() -> None:
    line = counts_line({f"species {number:05}": 10 + number for number in range(10_000)})
    assert line == "10,000 classes of 10 to 10,009 pictures, from species 00000 to species 09999"
