"""One page about one run, in one file: it needs no server, no network and no other file, and prints as it is.

It is put together from what the run and `scripts/evaluate` wrote; no picture is asked anew and torch is not needed.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from marten.charts import chart
from marten.errors import DataError
from marten.pages import facts, figure, gallery, headline, jpeg_address, page, scrolling, section, table
from modelspec import ModelCard

_MOST_CLASSES = 40
"""Classes up to which the confusion matrix and the class table show all; beyond, the most mistaken ones."""


@dataclass(frozen=True)
class Records:
    """What is known of a run.

    Attributes:
        card: of the model.
        history: rows of metrics.jsonl.
        timing: rows of timing.jsonl.
        evaluation: evaluation.json; empty when the model was not evaluated.
        predictions: rows of predictions.csv.
        mistakes: of mistakes.json, their pictures as data addresses.
    """

    card: ModelCard
    history: Sequence[Mapping[str, Any]]
    timing: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    predictions: Sequence[Mapping[str, str]]
    mistakes: Sequence[Mapping[str, Any]]


def read_records(model: Path, evaluation: Path | None = None) -> Records:
    """Gather the records of a run.

    Args:
        model: the state dict; its card lies beside it, the run's folder too where it was trained here.
        evaluation: folder that `scripts/evaluate` wrote; <model>.run/evaluation by default, where there is one.

    Raises:
        CardError: no card.
        DataError: a folder without an evaluation was named, or one of other weights.
    """
    card = ModelCard.read(model.with_suffix(".json"))
    run = model.with_suffix(".run")
    folder = evaluation or run / "evaluation"
    told: dict[str, Any] = {}
    predictions: list[dict[str, str]] = []
    mistakes: list[dict[str, Any]] = []
    if (folder / "evaluation.json").is_file():
        told = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        if told["weights_sha256"] != card.weights_sha256:
            raise DataError(f"{folder} judges other weights than {model}: run scripts/evaluate again")
        with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
            predictions = list(csv.DictReader(file))
        if (folder / "mistakes.json").is_file():
            mistakes = json.loads((folder / "mistakes.json").read_text(encoding="utf-8"))
        for one in mistakes:
            for key in ("picture", "cam"):
                one[key] = jpeg_address((folder / one[key]).read_bytes())
    elif evaluation:
        raise DataError(f"no evaluation.json in {evaluation}: run scripts/evaluate --out {evaluation} first")
    return Records(card, _rows(run / "metrics.jsonl"), _rows(run / "timing.jsonl"), told, predictions, mistakes)


def report_page(records: Records) -> str:
    """The page, as HTML text."""
    card = records.card
    title = f"{card.spec.name}: {card.data.get('name') or 'a trained model'}"
    parts = [
        _curves(records),
        _figures(records.evaluation),
        _confusion(records.evaluation),
        _probabilities(records),
        _gallery(records.mistakes),
        _data(records),
        section("Settings", facts(card.training)),
        section("How it came about", _origin(card)),
    ]
    return page(title, _subtitle(card), _headline(records), parts)


def told_share(share: Mapping[str, Any] | None, digits: int = 4) -> str:
    """A figure with its interval: "0.9925 [0.9782, 0.9974]", or a dash."""
    if share is None:
        return "–"
    interval = share.get("interval_95")
    ends = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{share['value']:.{digits}f}{ends}"


def figure_rows(scores: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, figure with its interval, what it is) of every figure of an evaluation that is one number."""
    if "mae" in scores:
        return [
            ("mean absolute error", told_share(scores["mae"]), "in the units of the answers"),
            ("root mean squared error", told_share(scores["rmse"]), "large errors weigh more"),
            ("R²", told_share(scores["r2"]), "1 is perfect, 0 no better than always answering the mean"),
            ("Spearman", told_share(scores["spearman"]), "how well the order is told"),
        ]
    rows = [("accuracy", told_share(scores["accuracy"]), "share of right answers")]
    rows += [
        (f"precision@{k}", told_share(share), f"true class among the {k} likeliest")
        for k, share in scores["precision_at_k"].items()
        if k != "1"
    ]
    return [
        *rows,
        ("balanced accuracy", f"{scores['balanced_accuracy']:.4f}", "mean of the classes' recalls"),
        ("macro F1", f"{scores['macro_f1']:.4f}", "mean of the classes' F1"),
        ("log loss", told_share(scores["log_loss"]), "0 is perfect; certain mistakes cost most"),
        ("Brier score", told_share(scores["brier"]), "squared distance of the probabilities, 0 to 2"),
        ("calibration error", f"{scores['calibration']['ece']:.4f}", "probability minus share of right answers"),
    ]


# ------------------------------------------------------------------------------------------------------- the parts


def _subtitle(card: ModelCard) -> str:
    created = str(card.provenance.get("created", ""))[:10]
    what = f"{len(card.spec.labels)} classes" if card.spec.labels else card.spec.task
    return ", ".join(part for part in (card.spec.arch, what, f"trained {created}" if created else "") if part)


def _headline(records: Records) -> str:
    scores = records.evaluation.get("scores")
    if scores:
        items = [(name, value) for name, value, _ in figure_rows(scores)[:1]]
        about = records.evaluation["data"]
        items += [("pictures asked", f"{scores['count']} ({about['part']})")]
        items += [(name, value) for name, value, _ in figure_rows(scores) if name in ("log loss", "R²", "Spearman")]
    else:
        items = [
            (name.replace("_", " "), told_share(one))
            for name, one in records.card.metrics.items()
            if isinstance(one, Mapping) and "value" in one
        ]
    cells = []
    for name, told in items:
        value, _, interval = told.partition(" [")
        cells.append((name, value, f"95 % interval {interval.rstrip(']')}" if interval else ""))
    return headline(cells)


def _curves(records: Records) -> str:
    if not records.history:
        return ""
    drawn = []
    for name in ("loss", "accuracy", "mae"):
        series = {
            told: [(row["epoch"], row[f"{part}_{name}"]) for row in records.history if f"{part}_{name}" in row]
            for part, told in (("validation", "validation"), ("train", "training"))
        }
        series = {told: points for told, points in series.items() if points}
        if series:
            ends = "; ".join(f"{told} from {p[0][1]:.3f} to {p[-1][1]:.3f}" for told, p in series.items())
            word = {"mae": "mean absolute error"}.get(name, name)
            drawn.append(figure(chart(f"{word} by epoch: {ends}", series, "epoch", word), word.capitalize()))
    rates = [(row["epoch"], row["lr"]) for row in records.history]
    drawn.append(figure(chart("learning rate by epoch", {"lr": rates}, "epoch", "learning rate"), "Learning rate"))
    return section("Training, epoch by epoch", f"<div class='charts'>{''.join(drawn)}</div>")


def _figures(evaluation: Mapping[str, Any]) -> str:
    if not evaluation:
        return section("Figures", "<p>Not evaluated yet: <code>scripts/evaluate</code> adds figures and mistakes.</p>")
    scores = evaluation["scores"]
    whole = table(("figure", "value [95 % interval]", "what it tells"), figure_rows(scores))
    rows = [
        (
            one["label"],
            str(one["support"]),
            told_share(one["precision"], 3),
            told_share(one["recall"], 3),
            "–" if one["f1"] is None else f"{one['f1']:.3f}",
            told_share(one["roc_auc"], 3),
        )
        for one in _worst_classes(scores.get("per_class", ()))
    ]
    if rows:
        whole += "<p class='soft'>By class:</p>"
        whole += table(("class", "pictures", "precision", "recall", "F1", "area under ROC"), rows)
    return section(f"Figures on {evaluation['data']['name']} ({evaluation['data']['part']})", whole)


def _worst_classes(per_class: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if len(per_class) <= _MOST_CLASSES:
        return list(per_class)
    return sorted((one for one in per_class if one["f1"] is not None), key=lambda one: one["f1"])[:_MOST_CLASSES]


def _confusion(evaluation: Mapping[str, Any]) -> str:
    matrix = evaluation.get("scores", {}).get("confusion")
    if not matrix:
        return ""
    labels = evaluation["labels"]
    if len(labels) > _MOST_CLASSES:
        pairs = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n]
        rows = [(labels[i], labels[j], str(n)) for n, i, j in sorted(pairs, reverse=True)[:_MOST_CLASSES]]
        return section("What is taken for what, most often", table(("is", "was answered", "pictures"), rows))
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in labels)
    lines = []
    for name, row in zip(labels, matrix, strict=True):
        shares = [n / max(sum(row), 1) for n in row]
        cells = [f"<td class='cell' style='--share:{s:.3f}'>{n}</td>" for n, s in zip(row, shares, strict=True)]
        lines.append(f"<tr><th scope='row'>{escape(name)}</th>{''.join(cells)}</tr>")
    top = f"<thead><tr><th scope='col'>is \\ answered</th>{head}</tr></thead>"
    matrix_table = f"<table>{top}<tbody>{''.join(lines)}</tbody></table>"
    note = "<p class='soft'>Rows are what a picture shows, columns what was answered.</p>"
    return section("Confusion matrix", note + scrolling(matrix_table, "Confusion matrix"))


def _probabilities(records: Records) -> str:
    scores = records.evaluation.get("scores", {})
    drawn = []
    if "calibration" in scores:
        points = [(one["confidence"], one["accuracy"]["value"]) for one in scores["calibration"]["bins"]]
        told = f"share of right answers by confidence; calibration error {scores['calibration']['ece']:.3f}"
        sizes = ", ".join(str(one["accuracy"]["count"]) for one in scores["calibration"]["bins"])
        picture = chart(told, {"answers": points}, "confidence", "share right", (0, 1), (0, 1), diagonal=True)
        drawn.append(
            figure(
                picture,
                f"Reliability: on the dashed line a probability means what it says. Pictures per point: {sizes}.",
            )
        )
        with_curves = [one for one in scores["per_class"] if one.get("roc")][
            -1 if len(scores["per_class"]) == 2 else 0 :
        ][:4]
        for key, x, y, told in (
            ("roc", "false alarms", "found", "ROC"),
            ("pr", "found (recall)", "right among answered (precision)", "Precision and recall"),
        ):
            series = {one["label"]: [(a, b) for a, b in one[key]] for one in with_curves}
            if series:
                picture = chart(
                    f"{told} of {', '.join(series)}", series, x, y, (0, 1), (0, 1.02), diagonal=key == "roc"
                )
                drawn.append(figure(picture, f"{told} of {', '.join(series)}."))
    elif "mae" in scores:
        points = [(float(row["score"]), float(row["answer"])) for row in records.predictions[:2000]]
        told = f"answers against true scores of {len(points)} pictures"
        drawn.append(figure(chart(told, {"pictures": points}, "true score", "answer", diagonal=True, dots=True), told))
    title = "What the probabilities are worth" if "calibration" in scores else "Answers and truth"
    return section(title, f"<div class='charts'>{''.join(drawn)}</div>") if drawn else ""


def _gallery(mistakes: Sequence[Mapping[str, Any]]) -> str:
    if not mistakes:
        return ""
    items = []
    for one in mistakes:
        sure = f" {100 * one['confidence']:.1f} %" if one.get("confidence") is not None else ""
        told = f"answered {one['answer']}{sure}, labelled {one['label']}"
        seen = ((one["picture"], one["path"]), (one["cam"], "where the network looked"))
        items.append((seen, told, one["path"]))
    note = "<p class='soft'>Worst first; beside each, what spoke for the answer (Grad-CAM, yellow most).</p>"
    return section("Worst mistakes", note + gallery(items))


def _data(records: Records) -> str:
    data = {key: value for key, value in records.card.data.items() if not isinstance(value, Mapping)}
    parts = {key: value for key, value in records.card.data.items() if isinstance(value, Mapping)}
    rows = [(part, *(f"{n:,}" if isinstance(n, int) else str(n) for n in one.values())) for part, one in parts.items()]
    heads = next((list(one) for one in parts.values()), [])
    alike = rows and all(list(one) == heads for one in parts.values())
    told = (
        table(("part", *heads), rows)
        if alike
        else "".join(facts({f"{part} {k}": v for k, v in one.items()}) for part, one in parts.items())
    )
    return section("Data", told + facts(data))


def _origin(card: ModelCard) -> str:
    command = card.provenance.get("command", "")
    rest = {key: value for key, value in card.provenance.items() if key != "command"}
    shown = f"<pre tabindex='0'>{escape(str(command))}</pre>" if command else ""
    return shown + facts({**rest, "weights sha256": card.weights_sha256})


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
