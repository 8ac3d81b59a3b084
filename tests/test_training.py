"""A run trains, keeps its best, and is stopped and resumed without a trace in its result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from marten.checkpoint import load_checkpoint
from marten.errors import CHECKPOINTED, DONE, DataError, TrainingError, UsageError
from marten.files import ROOT
from marten.settings import Settings
from marten.training import Run
from marten.weights import load_model
from modelspec import ModelCard, load_state_dict
from tests.pictures import draw, encode

QUICK: dict[str, Any] = {
    "conv_net": "cat_dog_conv_net",
    "batch_size": 4,
    "epochs": 2,
    "validation_split": 0.25,
    "num_workers": 0,
    "augment": "standard",
    "dropout": 0.3,
    "ema": 0.5,
    "device": "cpu",
    "precision": "fp32",
}


class StopAfter:
    """An interrupt that asks for a stop after so many batches; never, when None."""

    def __init__(self, batches: int | None) -> None:
        self._left = batches

    @property
    def reason(self) -> str:
        if self._left is None:
            return ""
        self._left -= 1
        return "SIGTERM" if self._left <= 0 else ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        label = "dog" if number % 2 else "cat"
        picture = draw(number, (60, 50))
        darker = picture.point([value // (1 + number % 2) for value in range(256)] * 3)
        (folder / f"{label}.{number}.jpg").write_bytes(encode(darker, "JPEG"))
    return folder


def run_once(data: Path, out: Path, stop_after: int | None = None, **changes: Any) -> int:
    run = Run(Settings(**{**QUICK, "data_dir": str(data), "model_path": str(out / "model.pth"), **changes}))
    run.resume()
    code = run.go_on(StopAfter(stop_after))  # type: ignore[arg-type]
    run.batches.close()
    run.held_out.close()
    return code


def result(out: Path) -> tuple[bytes, bytes]:
    return (out / "model.pth").read_bytes(), (out / "model.run" / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert run_once(folder, out) == DONE
    return out


def test_a_run_leaves_weights_card_metrics_curves_and_split(whole: Path, folder: Path) -> None:
    card = ModelCard.read(whole / "model.json")
    assert card.spec.labels == ("cat", "dog")
    assert card.spec.arch_args == {"num_classes": 2, "dropout": 0.3}
    assert card.data["train"] == {"cat": 9, "dog": 9}
    accuracy = card.metrics["validation_accuracy"]
    assert accuracy["count"] == 6
    assert accuracy["interval_95"][0] <= accuracy["value"] <= accuracy["interval_95"][1]
    network, _ = load_model(whole / "model.pth")
    assert not network.training
    assert sorted(p.name for p in (whole / "model.run").iterdir()) == [
        "curves.png",
        "metrics.jsonl",
        "split.csv",
        "timing.jsonl",
    ]
    rows = [json.loads(line) for line in (whole / "model.run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["train_count"] == 18 and row["validation_count"] == 6 for row in rows)
    assert len((whole / "model.run" / "split.csv").read_text().splitlines()) == 25


@pytest.mark.parametrize(("stop_after", "workers"), [(1, 0), (3, 2), (5, 0), (7, 1)])
def test_stopped_at_any_batch_and_resumed_it_ends_in_the_same_bits(
    folder: Path, whole: Path, tmp_path: Path, stop_after: int, workers: int
) -> None:
    # B0-17, B3-12: order, augmentation, dropout, averages and metrics all continue
    assert run_once(folder, tmp_path, stop_after) == CHECKPOINTED
    assert run_once(folder, tmp_path, None, num_workers=workers) == DONE
    assert result(tmp_path) == result(whole)


def test_an_empty_folder_with_only_the_checkpoint_is_enough(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # B0-04: after an eviction HTCondor brings back the checkpoint alone, its folder flattened away
    assert run_once(folder, tmp_path / "first", 6) == CHECKPOINTED
    (tmp_path / "fresh").mkdir()
    shutil.move(tmp_path / "first" / "model.run" / "checkpoint.pt", tmp_path / "fresh" / "checkpoint.pt")
    monkeypatch.chdir(tmp_path / "fresh")
    assert run_once(folder, Path("out")) == DONE
    assert result(Path("out")) == result(whole)


def test_a_torn_checkpoint_falls_back_and_ends_in_the_same_bits(folder: Path, whole: Path, tmp_path: Path) -> None:
    assert run_once(folder, tmp_path, 2) == CHECKPOINTED
    assert run_once(folder, tmp_path, 3) == CHECKPOINTED
    path = tmp_path / "model.run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    assert run_once(folder, tmp_path) == DONE
    assert result(tmp_path) == result(whole)


def test_a_changed_setting_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    # B0-17, B0-23: changed flags were accepted silently
    assert run_once(folder, tmp_path, 2) == CHECKPOINTED
    with pytest.raises(UsageError, match=r"--batch_size was 4, is 6; --seed was 0, is 9"):
        run_once(folder, tmp_path, batch_size=6, seed=9)


def test_self_checkpoint_exits_85_after_validation_and_ends_in_the_same_bits(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    # B0-15: the original lost the test pass of each checkpointed epoch
    flags = {"self_checkpoint": True, "checkpoint_every": "1"}
    assert run_once(folder, tmp_path, **flags) == CHECKPOINTED
    assert len((tmp_path / "model.run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert run_once(folder, tmp_path, **flags) == DONE
    assert result(tmp_path) == result(whole)


def test_the_checkpoint_holds_the_state_of_its_batch(folder: Path, tmp_path: Path) -> None:
    run_once(folder, tmp_path, 3)
    found = load_checkpoint(tmp_path / "model.run" / "checkpoint.pt")
    assert found is not None
    state = found[0]
    assert (state["epoch"], state["batch"], state["running"]["count"]) == (0, 3, 12)


def test_a_run_without_validation_keeps_its_last_best(folder: Path, tmp_path: Path) -> None:
    # B1-08: validation_split 0 crashed
    assert run_once(folder, tmp_path, validation_split=0.0, epochs=1) == DONE
    assert ModelCard.read(tmp_path / "model.json").metrics == {}


def test_a_frozen_backbone_stays_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    from marten.architectures import find_architecture
    from marten.weights import packaged_weights

    assert run_once(folder, tmp_path, conv_net="efficientnet_lite0", freeze="backbone", epochs=1, ema=0.0) == DONE
    published = load_state_dict(packaged_weights(find_architecture("efficientnet_lite0")))
    trained = load_state_dict(tmp_path / "model.pth")
    assert all(torch.equal(t, published[name]) for name, t in trained.items() if not name.startswith("_fc"))


def test_a_diverging_run_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="try a lower --lr"):
        run_once(folder, tmp_path, lr=(1e18,), schedule="constant", epochs=3)


def test_weights_that_fit_nothing_are_refused(folder: Path, tmp_path: Path, whole: Path) -> None:
    with pytest.raises(TrainingError, match="does not fit resnet18"):
        run_once(folder, tmp_path, conv_net="resnet18", weights=str(whole / "model.pth"))


def test_imagenet_weights_out_of_reach_are_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # B1-05: the network's file downloaded 548 MB at every start
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", no_network)
    with pytest.raises(TrainingError, match=r"--weights FILE") as error:
        run_once(folder, tmp_path, conv_net="resnet18")
    assert "\n" not in str(error.value)


def test_a_set_of_one_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat.1.jpg").write_bytes(encode(draw(1), "JPEG"))
    with pytest.raises(DataError, match="one class"):
        run_once(tmp_path, tmp_path)


def command(folder: Path, out: Path, *words: str) -> list[str]:
    flags = ["--conv_net", "cat_dog_conv_net", "--batch_size", "4", "--epochs", "8", "--validation_split", "0.25"]
    place = [
        "--data_dir",
        str(folder),
        "--model_path",
        str(out / "model.pth"),
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    return [sys.executable, str(ROOT / "train_main.py"), *flags, *place, "--num_workers", "1", *words]


def wait_for(path: Path, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written within {within_s} s"
        time.sleep(0.05)


@pytest.mark.slow
def test_real_signals_and_kill_9_end_in_the_same_bits(folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    straight = tmp_path / "straight"
    subprocess.run(command(folder, straight), check=True, env=environment, stdout=subprocess.DEVNULL)
    broken = tmp_path / "broken"
    words = ("--checkpoint_every", "1")
    for number, code in ((signal.SIGTERM, CHECKPOINTED), (signal.SIGUSR1, CHECKPOINTED), (signal.SIGKILL, -9)):
        with subprocess.Popen(
            command(folder, broken, *words), env=environment, stdout=subprocess.PIPE, text=True
        ) as running:
            assert running.stdout is not None
            next(line for line in running.stdout if line.startswith("Epoch"))
            running.send_signal(number)
            running.stdout.read()
            assert running.wait(60) == code
        wait_for(broken / "model.run" / "checkpoint.pt")
    subprocess.run(command(folder, broken, *words), check=True, env=environment, stdout=subprocess.DEVNULL)
    assert result(broken) == result(straight)


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
def test_misuse_is_one_line_and_exit_2(folder: Path, tmp_path: Path, words: list[str], told: str) -> None:
    # B1-07, B1-12
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_main.py"), "--data_dir", str(folder), *words], capture_output=True, text=True
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
    config.write_text("epoch = 3\n")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--config", str(config)])


def test_no_short_flag_is_used_twice() -> None:
    # B0-06
    from train_main import build_parser

    strings = [word for action in build_parser()._actions for word in action.option_strings]
    assert len(strings) == len(set(strings))
