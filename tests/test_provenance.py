"""A card tells how it was made, and nothing of the machine's folders."""

from __future__ import annotations

import sys

import pytest

from marten.provenance import provenance


def test_absolute_paths_are_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/home/me/train_main.py", "--data_dir", "/home/me/secret/cats", "--model_path=/tmp/m.pth", "--lr", "1e-3"]
    monkeypatch.setattr(sys, "argv", words)
    told = provenance()
    assert told["command"] == "train_main.py --data_dir '…/cats' '--model_path=…/m.pth' --lr 1e-3"
    assert told["versions"].startswith("marten ")
    assert told["created"].endswith("Z")
