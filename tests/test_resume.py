"""A run is stopped, killed and resumed without a trace in its result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marten.checkpoint import load_checkpoint
from marten.errors import CHECKPOINTED, DONE, TrainingError, UsageError
from marten.files import ROOT
from marten.settings import Settings
from marten.training import Run
from modelspec import ModelCard
from tests.runs import QUICK, StopAfter, result, run_once


@pytest.mark.parametrize(("stop_after", "workers"), [(1, 0), (3, 2), (6, 0), (10, 1)])
def test_stopped_at_any_batch_and_resumed_it_ends_in_the_same_bits(
    drawn_set: Path, whole_run: Path, tmp_path: Path, stop_after: int, workers: int
) -> None:
    # B0-17, B3-12: order, augmentation, dropout, averages and metrics all continue; 6 is amid the first validation
    assert run_once(drawn_set, tmp_path, stop_after) == CHECKPOINTED
    assert run_once(drawn_set, tmp_path, None, num_workers=workers) == DONE
    assert result(tmp_path) == result(whole_run)


def test_an_empty_folder_with_only_the_checkpoint_is_enough(
    drawn_set: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # B0-04: after an eviction HTCondor brings back the checkpoint alone, its folder flattened away
    assert run_once(drawn_set, tmp_path / "first", 6) == CHECKPOINTED
    (tmp_path / "fresh").mkdir()
    shutil.move(tmp_path / "first" / "model.run" / "checkpoint.pt", tmp_path / "fresh" / "checkpoint.pt")
    monkeypatch.chdir(tmp_path / "fresh")
    assert run_once(drawn_set, Path("out")) == DONE
    assert result(Path("out")) == result(whole_run)
    assert not Path("checkpoint.pt").exists()


def test_a_torn_checkpoint_falls_back_and_ends_in_the_same_bits(
    drawn_set: Path, whole_run: Path, tmp_path: Path
) -> None:
    assert run_once(drawn_set, tmp_path, 2) == CHECKPOINTED
    assert run_once(drawn_set, tmp_path, 3) == CHECKPOINTED
    path = tmp_path / "model.run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    assert run_once(drawn_set, tmp_path) == DONE
    assert result(tmp_path) == result(whole_run)


def test_a_changed_setting_is_refused_by_name(drawn_set: Path, tmp_path: Path) -> None:
    # B0-17, B0-23: changed flags were accepted silently
    assert run_once(drawn_set, tmp_path, 2) == CHECKPOINTED
    with pytest.raises(UsageError, match=r"--batch_size was 4, is 6; --seed was 0, is 9"):
        run_once(drawn_set, tmp_path, batch_size=6, seed=9)


def test_self_checkpoint_exits_85_after_validation_and_ends_in_the_same_bits(
    drawn_set: Path, whole_run: Path, tmp_path: Path
) -> None:
    # B0-15: the original lost the test pass of each checkpointed epoch
    flags = {"self_checkpoint": True, "checkpoint_every": "1"}
    assert run_once(drawn_set, tmp_path, **flags) == CHECKPOINTED
    assert len((tmp_path / "model.run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert run_once(drawn_set, tmp_path, **flags) == DONE
    assert result(tmp_path) == result(whole_run)


def test_the_checkpoint_holds_the_state_of_its_batch(drawn_set: Path, tmp_path: Path) -> None:
    run_once(drawn_set, tmp_path, 3)
    found = load_checkpoint(tmp_path / "model.run" / "checkpoint.pt")
    assert found is not None
    state = found[0]
    assert (state["epoch"], state["batch"], state["running"]["count"]) == (0, 3, 12)


def test_a_stop_while_validating_is_a_stop_at_once(drawn_set: Path, tmp_path: Path) -> None:
    # a validation of minutes outlasted the seconds between SIGTERM and SIGKILL
    assert run_once(drawn_set, tmp_path, 6) == CHECKPOINTED
    found = load_checkpoint(tmp_path / "model.run" / "checkpoint.pt")
    assert found is not None
    assert (found[0]["epoch"], found[0]["batch"], found[0]["history"]) == (0, 5, [])


def test_self_checkpoint_exits_85_after_minutes_too(drawn_set: Path, tmp_path: Path) -> None:
    # it saved without exiting, so HTCondor never fetched a checkpoint
    assert run_once(drawn_set, tmp_path, self_checkpoint=True, checkpoint_every="0.001s") == CHECKPOINTED
    found = load_checkpoint(tmp_path / "model.run" / "checkpoint.pt")
    assert found is not None
    assert found[0]["batch"] == 1


def test_a_resumed_epoch_is_timed_by_what_was_done_in_it(
    drawn_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 18 pictures were told for the time of the last 2; and the rows of a former run stayed
    assert run_once(drawn_set, tmp_path, 4, epochs=1) == CHECKPOINTED
    for counts in ([2], [18]):
        assert run_once(drawn_set, tmp_path, epochs=1) == DONE
        assert ("is there already" in capsys.readouterr().out) == (counts == [18])  # a finished run begins anew
        lines = (tmp_path / "model.run" / "timing.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [round(row["images_per_s"] * row["seconds"]) for row in rows] == counts


def test_it_goes_on_where_auto_would_mean_another_number_format(
    drawn_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an eviction from a machine with bf16 to one without ended the job with exit code 2
    monkeypatch.setattr("marten.devices._best_precision", lambda device: "bf16")
    assert run_once(drawn_set, tmp_path, 2, precision="auto", epochs=1) == CHECKPOINTED
    monkeypatch.setattr("marten.devices._best_precision", lambda device: "fp32")
    assert run_once(drawn_set, tmp_path, precision="auto", epochs=1) == DONE


def test_first_weights_are_not_needed_again_and_their_place_is_not_told(
    drawn_set: Path, whole_run: Path, tmp_path: Path
) -> None:
    # a resumed run asked the hub again, and the card told the folders of the machine
    first = tmp_path / "weights" / "first.pth"
    first.parent.mkdir()
    shutil.copyfile(whole_run / "model.pth", first)
    assert run_once(drawn_set, tmp_path, 2, weights=str(first), epochs=1) == CHECKPOINTED
    first.unlink()
    assert run_once(drawn_set, tmp_path, weights="/elsewhere/first.pth", epochs=1) == DONE
    card = ModelCard.read(tmp_path / "model.json")
    assert (card.training["weights"], card.training["started_from"]) == ("first.pth", "first.pth")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_goes_away_costs_one_line_and_nothing_of_the_run(
    drawn_set: Path, whole_run: Path, tmp_path: Path, workers: int
) -> None:
    # a network drive that failed for a moment was a traceback, and the run was lost
    data = shutil.copytree(drawn_set, tmp_path / "data")
    flags = {**QUICK, "num_workers": workers, "data_dir": str(data), "model_path": str(tmp_path / "model.pth")}
    run = Run(Settings(**flags))
    gone = run.material.training[7].path
    gone.rename(tmp_path / "away")
    with pytest.raises(TrainingError, match=r"could be read before .* The state is saved") as error:
        run.go_on(StopAfter(None))  # type: ignore[arg-type]
    run.batches.close()
    assert "\n" not in str(error.value)
    (tmp_path / "away").rename(gone)
    assert run_once(data, tmp_path) == DONE
    assert result(tmp_path) == result(whole_run)


def command(drawn_set: Path, out: Path, *words: str) -> list[str]:
    flags = ["--conv_net", "cat_dog_conv_net", "--batch_size", "4", "--epochs", "8", "--validation_split", "0.25"]
    place = [
        "--data_dir",
        str(drawn_set),
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
def test_real_signals_and_kill_9_end_in_the_same_bits(drawn_set: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    straight = tmp_path / "straight"
    subprocess.run(command(drawn_set, straight), check=True, env=environment, stdout=subprocess.DEVNULL)
    broken = tmp_path / "broken"
    words = ("--checkpoint_every", "1")
    for number, code in ((signal.SIGTERM, CHECKPOINTED), (signal.SIGUSR1, CHECKPOINTED), (signal.SIGKILL, -9)):
        with subprocess.Popen(
            command(drawn_set, broken, *words), env=environment, stdout=subprocess.PIPE, text=True
        ) as running:
            assert running.stdout is not None
            next(line for line in running.stdout if line.startswith("Epoch"))
            running.send_signal(number)
            running.stdout.read()
            assert running.wait(60) == code
        wait_for(broken / "model.run" / "checkpoint.pt")
    subprocess.run(command(drawn_set, broken, *words), check=True, env=environment, stdout=subprocess.DEVNULL)
    assert result(broken) == result(straight)
