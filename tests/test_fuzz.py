"""Damaged pictures get a 4xx, never a 5xx, and cost their neighbours nothing; `python -m tests.fuzz` runs many more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from handlers import image_classifier
from tests.fuzz import ALLOWED, fuzz


def test_some_hundred_damaged_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_classifier, "check_own", lambda folder, *files: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cat_dog_conv_net", raising=False)
    *_, (done, told) = fuzz(700, 7, tmp_path)
    sys.modules.pop("cat_dog_conv_net", None)
    assert done == 700
    assert set(told) <= set(ALLOWED)
    assert told[422] > 100
    assert told[200] > 100
