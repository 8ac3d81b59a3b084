"""A checkpoint survives what can happen to a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marten.checkpoint import load_checkpoint, save_checkpoint
from marten.errors import MartenError, TrainingError


def saved(path: Path, value: float) -> None:
    save_checkpoint(path, {"value": value, "tensor": torch.full((3,), value), "list": [1, "two", None]})


def value_of(path: Path) -> float:
    found = load_checkpoint(path)
    assert found is not None
    return found[0]["value"]


def test_it_opens_with_weights_only(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoint.pt"
    saved(path, 1)
    state = torch.load(path, weights_only=True)
    assert torch.equal(state["tensor"], torch.ones(3))


def test_a_torn_or_rotten_newest_file_falls_back_to_the_one_before(tmp_path: Path) -> None:
    # B0-16
    path = tmp_path / "checkpoint.pt"
    saved(path, 1)
    saved(path, 2)
    assert value_of(path) == 2
    whole = path.read_bytes()
    for broken in (whole[:100], whole[:-1], b"", whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]):
        path.write_bytes(broken)
        assert value_of(path) == 1


def test_two_damaged_files_are_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    saved(path, 1)
    path.write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="damaged"):
        load_checkpoint(path)


def test_none_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "checkpoint.pt") is None


def test_a_flattened_checkpoint_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # B0-04: HTCondor puts output/checkpoint.pt back as ./checkpoint.pt
    path = tmp_path / "output" / "model.run" / "checkpoint.pt"
    saved(path, 7)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    path.rename(fresh / "checkpoint.pt")
    monkeypatch.chdir(fresh)
    assert value_of(Path("output/model.run/checkpoint.pt")) == 7


def test_what_others_call_so_in_the_current_folder_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("checkpoint.pt").write_bytes(b"somebody else's")
    assert load_checkpoint(Path("output/model.run/checkpoint.pt")) is None
    monkeypatch.setenv("_CONDOR_SCRATCH_DIR", str(tmp_path))  # there it can only be ours
    with pytest.raises(TrainingError, match="damaged"):
        load_checkpoint(Path("output/model.run/checkpoint.pt"))


def test_a_write_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    saved(path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("marten.files.os.fsync", full)
    with pytest.raises(MartenError, match="No space left"):
        saved(path, 2)
    monkeypatch.undo()
    assert value_of(path) == 1
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
