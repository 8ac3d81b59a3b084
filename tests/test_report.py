"""The page of a run is whole in itself and says what the records say; the hub's card is YAML that tells the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from marten.charts import chart
from marten.errors import DataError
from marten.evaluate import ask, evaluate, pictures_to_ask, write_evaluation, write_mistakes
from marten.files import ROOT
from marten.hub_card import hub_card
from marten.report import read_records, report_page
from marten.weights import load_model
from tests.pictures import draw, encode

LABELS = ("cat <b>", "dog & cow", "newt")
VOID = {"meta", "img", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Tags with their attributes and the visible text; checks on the way that each tag is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], []):
            self.text += data + " "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """A model of three classes, with a run's records and an evaluation beside it."""
    folder = tmp_path_factory.mktemp("run")
    source = tiny_model(labels=LABELS)
    model = folder / "model.pth"
    model.write_bytes(source.read_bytes())
    model.with_suffix(".json").write_bytes(source.with_suffix(".json").read_bytes())
    rows = [{"epoch": e, "lr": 0.1 / e, "train_loss": 1 / e, "train_accuracy": 0.5 + e / 20} for e in (1, 2, 3)]
    run = folder / "model.run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = ["path,label"]
    for number in range(12):
        (folder / f"{number} ünd.png").write_bytes(encode(draw(number, (60, 50)), "PNG"))
        table.append(f"{number} ünd.png,{LABELS[number % 3]}")
    (folder / "table.csv").write_text("\n".join(table), encoding="utf-8")
    network, card = load_model(model)
    pictures, part = pictures_to_ask(card, folder / "table.csv")
    judged = evaluate(card.spec, pictures, part, ask(network, card.spec, pictures.samples))
    write_evaluation(run / "evaluation", card, judged)
    write_mistakes(run / "evaluation", network, card.spec, judged, 2)
    return model


def test_the_page_needs_nothing_else_and_says_what_the_records_say(model: Path) -> None:
    records = read_records(model)
    text = report_page(records)
    page = Page(text)
    assert not re.search(r"""(?:src|href)=['"](?!data:)""", text)
    assert not re.search(r"url\(|@import|<script|https?://", text)
    assert {tag for tag, _ in page.tags} >= {"main", "h1", "h2", "svg", "table", "img", "figure"}
    accuracy = records.evaluation["scores"]["accuracy"]
    assert f"{accuracy['value']:.4f}" in page.text
    for label in LABELS:
        assert label in page.text
    for one in records.mistakes:
        assert one["path"] in page.text
        assert f"labelled {one['label']}" in page.text
    assert len(records.mistakes) == 2


def test_the_page_can_be_read_without_eyes_and_on_a_phone(model: Path) -> None:
    page = Page(report_page(read_records(model)))
    assert page.tags[0] == ("html", {"lang": "en"})
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if attributes.get("class") == "wide":
            assert attributes["tabindex"] == "0"
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in page.tags
    assert "prefers-color-scheme:dark" in (ROOT / "marten" / "report.css").read_text()


def test_a_run_that_was_not_evaluated_has_its_page_too(model: Path, tmp_path: Path) -> None:
    for suffix in (".pth", ".json"):
        (tmp_path / f"bare{suffix}").write_bytes(model.with_suffix(suffix).read_bytes())
    page = Page(report_page(read_records(tmp_path / "bare.pth")))
    assert "Not evaluated yet" in page.text
    with pytest.raises(DataError, match=r"no evaluation\.json"):
        read_records(tmp_path / "bare.pth", tmp_path / "nowhere")


def test_an_evaluation_of_other_weights_is_refused(model: Path, tmp_path: Path) -> None:
    for suffix in (".pth", ".json"):
        (tmp_path / f"new{suffix}").write_bytes(model.with_suffix(suffix).read_bytes())
    card = json.loads((tmp_path / "new.json").read_text())
    (tmp_path / "new.json").write_text(json.dumps(card | {"weights_sha256": "0" * 64}))
    with pytest.raises(DataError, match="other weights"):
        read_records(tmp_path / "new.pth", model.with_suffix(".run") / "evaluation")


def test_the_front_matter_is_yaml_with_the_measured_figures(model: Path) -> None:
    records = read_records(model)
    _, front, body = hub_card(records, "bsd-3-clause").split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["license"] == "bsd-3-clause"
    assert told["pipeline_tag"] == "image-classification"
    (result,) = told["model-index"][0]["results"]
    assert result["dataset"] == {"name": "table", "type": "table", "split": "all"}
    values = {one["type"]: one["value"] for one in result["metrics"]}
    assert values["accuracy"] == pytest.approx(records.evaluation["scores"]["accuracy"]["value"], abs=1e-5)
    assert values["f1"] == pytest.approx(records.evaluation["scores"]["macro_f1"], abs=1e-5)
    assert "not calibrated" in body
    assert "license" not in hub_card(records)


def test_the_command_writes_both(model: Path, tmp_path: Path) -> None:
    words = ["--model_path", str(model), "--out", str(tmp_path / "page.html"), "--model_card"]
    told = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "report"), *words], capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 0, told.stderr
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report_page(read_records(model))
    assert (tmp_path / "README.md").read_text(encoding="utf-8").startswith("---\nlibrary_name: pytorch\n")


def test_a_chart_puts_points_where_they_belong() -> None:
    drawn = chart('rise & "fall"', {"a": [(0, 0), (1, 1)]}, "x", "y", (0, 1), (0, 1), diagonal=True)
    root = ElementTree.fromstring(drawn)
    assert root.get("aria-label") == 'rise & "fall"'
    line, ideal = (
        next(p.get("points") for p in root.iter("polyline") if p.get("class") == c) for c in ("line s0", "ideal")
    )
    assert line == ideal
    ticks = [t.text for t in root.iter("text")]
    assert ticks.count("0.2") == ticks.count("1") == 2
    flat = chart("flat", {"a": [(1, 3.0)], "b": [(1, 3.0)]}, "x", "y")
    assert "nan" not in flat
    assert 'class="key s1"' in flat
