"""A README for the place where models are shared: front matter that the Hugging Face hub reads, and the card in words.

Source: https://github.com/huggingface/hub-docs/blob/main/modelcard.md, the fields of its front matter.
"""

from __future__ import annotations

import json
from typing import Any

from marten.report import Records, figure_rows

_TASKS = {"classification": "image-classification", "embedding": "image-feature-extraction"}


def hub_card(records: Records, licence: str = "") -> str:
    """The README as Markdown text.

    Args:
        records: of the run; evaluated, its figures become the model index.
        licence: identifier of the weights' licence, for instance "bsd-3-clause"; left out when empty.
    """
    card = records.card
    scores = records.evaluation.get("scores", {})
    data = records.evaluation.get("data", {}) or {"name": card.data.get("name", ""), "part": "validation"}
    front: list[str] = [*([f"license: {_text(licence)}"] if licence else []), "library_name: pytorch"]
    if card.spec.task in _TASKS:
        front.append(f"pipeline_tag: {_TASKS[card.spec.task]}")
    front += ["tags:", f"- {_text(card.spec.task)}", f"- {_text(card.spec.arch)}", "- torchserve"]
    measured = _measured(scores or card.metrics)
    if measured:
        front += ["metrics:", *(f"- {name}" for name in measured)]
        front += ["model-index:", f"- name: {_text(card.spec.name)}", "  results:", "  - task:"]
        front.append(f"      type: {_TASKS.get(card.spec.task, 'image-regression')}")
        front += ["    dataset:", f"      name: {_text(data['name'])}", f"      type: {_text(data['name'])}"]
        front += [f"      split: {_text(data['part'])}", "    metrics:"]
        for name, value in measured.items():
            front += [f"    - type: {name}", f"      value: {value:.6g}"]
    lines = ["---", *front, "---", "", f"# {card.spec.name}", "", _what(records), "", "## Use", ""]
    lines += ["The weights are a bare state dict; the card beside them says how a picture becomes a tensor.", ""]
    lines += [f"    python predict_main.py --model_path {card.spec.name}.pth --img_path picture.jpg", ""]
    if scores:
        lines += [f"## Figures on {data['name']} ({data['part']}, {scores['count']} pictures)", ""]
        lines += ["| figure | value, 95 % interval | what it tells |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in figure_rows(scores)]
        lines.append("")
    lines += ["## Data", "", *_bullets(card.data), "", "## Training", "", *_bullets(card.training), ""]
    lines += ["## Limits", "", _limits(records), "", "## Origin", "", *_bullets(card.provenance)]
    lines.append(f"- weights sha256: `{card.weights_sha256}`")
    return "\n".join(lines) + "\n"


def _measured(found: Any) -> dict[str, float]:
    """Figures under the names that the hub knows."""
    names = {"accuracy": "accuracy", "validation_accuracy": "accuracy", "mae": "mae", "validation_mae": "mae"}
    told = {
        hub: float(found[ours]["value"])
        for ours, hub in {**names, "rmse": "rmse", "r2": "r_squared"}.items()
        if ours in found
    }
    return told | ({"f1": float(found["macro_f1"])} if "macro_f1" in found else {})


def _what(records: Records) -> str:
    spec = records.card.spec
    height, width = spec.preprocess.size_px
    if spec.task == "classification":
        listed = ", ".join(spec.labels[:20]) + (f" and {len(spec.labels) - 20} more" if len(spec.labels) > 20 else "")
        told = f"Tells {len(spec.labels)} classes apart: {listed}."
    else:
        told = f"Answers a picture with a {'score' if spec.task == 'regression' else 'vector'}."
    return f"{told} Architecture `{spec.arch}`, input {width}x{height} pixels ({spec.preprocess.resize})."


def _limits(records: Records) -> str:
    spec = records.card.spec
    known = (
        "It answers with one of its classes whatever a picture shows"
        if spec.task == "classification"
        else "It answers every picture, also one unlike any it was trained on"
    )
    calibrated = spec.task != "classification" or spec.temperature != 1.0
    return (
        f"{known}. "
        + ("" if calibrated else "Its probabilities were not calibrated. ")
        + "The figures above hold for pictures like those it was judged by, and for no others."
    )


def _bullets(facts: Any) -> list[str]:
    plain = (
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in facts.items()
    )
    return [f"- {key.replace('_', ' ')}: `{value}`" for key, value in plain if value]


def _text(value: str) -> str:
    """A YAML string: JSON's are."""
    return json.dumps(value, ensure_ascii=False)
