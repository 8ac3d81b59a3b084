"""A card tells how it was made, and nothing of the machine's folders."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from marten import provenance as module
from marten.provenance import provenance


def test_absolute_paths_are_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/home/me/train_main.py", "--data_dir", "/home/me/secret/cats", "--model_path=/tmp/m.pth", "--lr", "1e-3"]
    monkeypatch.setattr(sys, "argv", words)
    told = provenance()
    assert told["command"] == "train_main.py --data_dir '…/cats' '--model_path=…/m.pth' --lr 1e-3"
    assert told["versions"].startswith("marten ")
    assert told["created"].endswith("Z")


def test_an_image_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MARTEN_COMMIT", "abc123")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    module._commit.cache_clear()
    assert module._commit() == "abc123"
    (tmp_path / ".git").mkdir()
    module._commit.cache_clear()
    assert module._commit() == "unknown"
    module._commit.cache_clear()
