"""What scripts/infer and inputs are measured by: contestants do the same work, and ratios are those of turns."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from marten.bench.contestants import make_weights
from marten.bench.inferring import EXACT, FAST, LIMIT, ORIGINAL, inference_rows, inference_table
from marten.bench.inputs import DECODED, FILES, SHARDS, bench_inputs, inputs_table
from marten.files import ROOT
from marten.inference import ask
from marten.pictures import find_sources
from marten.weights import load_model
from tests.pictures import draw, encode


def test_ratios_are_medians_of_turns() -> None:
    rounds = [
        {ORIGINAL: 10.0, EXACT: 40.0, FAST: 90.0, LIMIT: 100.0},
        {ORIGINAL: 20.0, EXACT: 50.0, FAST: 40.0, LIMIT: 40.0},
        {ORIGINAL: 10.0, EXACT: 35.0, FAST: 66.0, LIMIT: 60.0},
    ]
    times = [{ORIGINAL: 90.0, EXACT: 20.0, FAST: 10.0, LIMIT: cpu_ms} for cpu_ms in (8.0, 9.5, 11.0)]
    found = {"network": "vgg", "rounds": rounds, "cpu_ms": times}
    assert inference_table(found)[3] == "| ours fp32 | 40.0 | 3.50 (2.50–4.00) | 20.0 |"
    told = [str(row) for row in inference_rows(found)]
    assert told == [
        "reached  vgg: images/s of scripts/infer ÷ in process: 1 (wanted ≥ 0.9)",
        "reached  vgg: images/s of scripts/infer × original: 6.6 (wanted ≥ 3)",
        "reached  vgg: processor time in process ÷ scripts/infer: 0.95 (wanted ≥ 0.9)",
    ]


@pytest.mark.slow
def test_the_original_told_again_answers_as_scripts_infer_does(tmp_path: Path) -> None:
    """The same network and pictures: only the filter of the resizing may differ, and the method."""
    weights = make_weights("cat_dog_conv_net", tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        (pictures / f"{number}.jpg").write_bytes(encode(draw(number, (500, 375)), "JPEG"))
    words = [sys.executable, "-m", "marten.bench.original_infer", weights, pictures, tmp_path / "o.csv"]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images_s"] > 0
    with open(tmp_path / "o.csv", newline="") as file:
        theirs = {row["fileid"]: float(row["prob"]) for row in csv.DictReader(file)}
    network, card = load_model(weights)
    (rows,) = ask([network], card.spec, find_sources([pictures]))
    assert {id_: pytest.approx(found[1], abs=1e-3) for id_, found in rows if not isinstance(found, str)} == theirs


def test_inputs_are_measured_and_told(drawn_set: Path) -> None:
    said: list[str] = []
    found = bench_inputs("cat_dog_conv_net", drawn_set, workers=0, rounds=2, seconds=0.01, say=said.append)
    assert len(said) == len(found["rounds"]) == 2
    assert found["pictures"] == 24
    assert min(min(one[kind] for kind in (FILES, SHARDS, DECODED)) for one in found["rounds"]) > 0
    assert found["size_mb"][FILES] < found["size_mb"][SHARDS] < found["size_mb"][DECODED]
    found["rounds"] = [{FILES: 10.0, SHARDS: 12.0, DECODED: 30.0}, {FILES: 20.0, SHARDS: 20.0, DECODED: 50.0}]
    assert inputs_table(found)[4].endswith("| 40.0 | 2.75 (2.50–3.00) |")
