"""Batches end with the program that draws them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from marten.files import ROOT
from tests.pictures import draw, encode

FORGETFUL = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from marten.batches import Batches, Pictures
from marten.datasets import find_pictures
from modelspec import Preprocess
batches = Batches(Pictures(find_pictures(Path({data!r})).samples, Preprocess()), 2, shuffle=True, workers=2)
drawn = batches.epoch(0)
next(drawn)
raise RuntimeError("on the way")
"""


def test_a_program_that_forgets_to_close_them_still_ends(tmp_path: Path) -> None:
    for number in range(8):
        label = "cat" if number % 2 else "dog"
        (tmp_path / f"{label}.{number}.jpg").write_bytes(encode(draw(number, (40, 30)), "JPEG"))
    words = [sys.executable, "-c", FORGETFUL.format(root=str(ROOT), data=str(tmp_path))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: on the way\n")
