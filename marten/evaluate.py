"""How good a trained model is on labelled pictures: its figures, its predictions file by file, its worst mistakes.

Everything goes through the transform and the outputs that serve. What the model was trained on does not count: where
the data set is the one of the card, only the pictures that its split held out are asked.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from explain import heat_map, overlay
from marten.batches import Batches, Pictures
from marten.datasets import PictureSet, Sample, find_pictures, inspect, split
from marten.errors import DataError, UsageError
from marten.files import replacing, write_text
from marten.scores import Floats, Ints, classification_scores, fit_temperature, regression_scores
from marten.scoretable import Scale, find_scores
from modelspec import ModelCard, ModelSpec

PARTS = ("auto", "all", "train", "validation")
_THUMBNAIL_PX = 256


@dataclass(frozen=True)
class Evaluation:
    """What a model answered for labelled pictures.

    Attributes:
        pictures: the set, `samples` being those that were asked.
        part: "all", "train" or "validation" of it.
        logits_NK: raw outputs, float64 (pictures, outputs), before the temperature.
        scores: every figure, as plain data.
    """

    pictures: PictureSet
    part: str
    logits_NK: Floats
    scores: dict[str, Any]

    @property
    def labels_N(self) -> Ints:
        """True classes, int64 (pictures,)."""
        return np.array([s.label for s in self.pictures.samples], dtype=np.int64)


def pictures_to_ask(
    card: ModelCard, data_dir: Path, part: str = "auto", progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[PictureSet, str]:
    """Find and check the pictures of a data set that a model is to be judged by.

    Args:
        card: of the model.
        data_dir: folder or table.
        part: "auto" takes the held-out part of the very set that the card tells of, and all of any other;
            "train" and "validation" part the set as its training did.
        progress: called with (done, total).

    Returns:
        (the set with those samples alone, the part they are).

    Raises:
        DataError: nothing readable there, a class that the model does not know, or an empty part.
        UsageError: an unknown part, or a part of a set that the model was not trained on.
    """
    if part not in PARTS:
        raise UsageError(f"--part must be one of {', '.join(PARTS)}, found {part!r}")
    is_score = card.spec.task == "regression"
    found = find_scores(data_dir) if is_score else find_pictures(data_dir, card.spec.labels)
    pictures = inspect(found, card.spec.preprocess, progress=progress)
    own = pictures.digest == card.data.get("digest")
    if part == "auto":
        part = "validation" if own and card.training.get("validation_split") else "all"
    if part == "all":
        return _scaled(pictures, card), part
    if not own:
        raise UsageError(
            f"--part {part}: {data_dir} is not the set that the model was trained on (its digest differs): use all"
        )
    parts = split(pictures.samples, card.training["validation_split"], card.training["seed"])
    chosen = parts[part == "validation"]
    if not chosen:
        raise DataError(f"the model was trained with --validation_split 0: there is no {part} part")
    return _scaled(replace(pictures, samples=tuple(chosen)), card), part


def _scaled(pictures: PictureSet, card: ModelCard) -> PictureSet:
    """The set with its scores on the scale of the model's answers, where training chose another than the table's."""
    scale = card.data.get("scale")
    return replace(pictures, samples=tuple(Scale(**scale).apply(pictures.samples))) if scale else pictures


@torch.inference_mode()
def ask(
    network: torch.nn.Module,
    spec: ModelSpec,
    samples: Sequence[Sample],
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Floats:
    """The network's outputs for samples in their order, float64 (pictures, outputs).

    Args:
        network: in eval mode, on `device`.
        spec: of the network.
        samples: readable ones, from `inspect`.
        device: where the network is.
        batch_size: pictures per forward pass.
        workers: processes that decode; 0 decodes in this one.
        progress: called with the number of batches done.
    """
    batches = Batches(Pictures(samples, spec.preprocess), batch_size, shuffle=False, workers=workers)
    outputs = []
    for pixels_NHWC, *_ in batches.epoch(0):
        images_NCHW = spec.preprocess.normalize(pixels_NHWC.to(device))
        outputs.append(spec.logits(network, images_NCHW).cpu().double())
        progress(len(outputs))
    batches.close()
    found: Floats = torch.cat(outputs).numpy()
    return found


def evaluate(spec: ModelSpec, pictures: PictureSet, part: str, logits_NK: Floats) -> Evaluation:
    """Judge outputs by the card's labels and temperature, or its scale of scores."""
    if spec.task == "regression":
        return Evaluation(pictures, part, logits_NK, regression_scores(*_truth_and_answers(spec, pictures, logits_NK)))
    labels_N = np.array([s.label for s in pictures.samples], dtype=np.int64)
    return Evaluation(
        pictures, part, logits_NK, classification_scores(labels_N, _probabilities(spec, logits_NK), spec.labels)
    )


def calibrated(card: ModelCard, evaluation: Evaluation) -> ModelCard:
    """The card with the temperature that fits these pictures best, and where it came from.

    Raises:
        UsageError: the pictures are those the model was trained on, or too few of its answers are wrong to tell.
    """
    seen = evaluation.part == "all" and evaluation.pictures.digest == card.data.get("digest")
    if card.spec.task != "classification":
        raise UsageError("--calibrate is for classifiers: a score has no probability")
    if evaluation.part == "train" or seen:
        raise UsageError("--calibrate needs pictures that the model was not trained on: use --part validation")
    accuracy = evaluation.scores["accuracy"]
    if accuracy["hits"] == accuracy["count"]:
        raise UsageError(
            f"--calibrate: all {accuracy['count']} answers are right, which fits any confidence: give more pictures"
        )
    temperature = fit_temperature(evaluation.logits_NK, evaluation.labels_N)
    told = {"data": evaluation.pictures.name, "part": evaluation.part, "count": len(evaluation.pictures.samples)}
    return replace(
        card,
        spec=replace(card.spec, temperature=temperature),
        metrics={**card.metrics, "temperature": {"value": temperature, **told}},
    )


def write_evaluation(folder: Path, card: ModelCard, evaluation: Evaluation) -> None:
    """Write predictions.csv, one row per file, and evaluation.json, every figure, into a folder.

    Raises:
        MartenError: the folder cannot be written.
    """
    spec, pictures = card.spec, evaluation.pictures
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerows(_score_rows(spec, evaluation) if spec.task == "regression" else _class_rows(spec, evaluation))
    write_text(folder / "predictions.csv", rows.getvalue())
    told = {
        "model": spec.name,
        "weights_sha256": card.weights_sha256,
        "labels": list(spec.labels),
        "temperature": spec.temperature,
        "data": {
            "name": pictures.name,
            "part": evaluation.part,
            "digest": pictures.digest,
            "counts": pictures.counts(),
            "rejected": [list(one) for one in pictures.rejected],
        },
        "scores": evaluation.scores,
    }
    write_text(folder / "evaluation.json", json.dumps(told, indent=1) + "\n")


def _class_rows(spec: ModelSpec, evaluation: Evaluation) -> Iterator[tuple[object, ...]]:
    yield ("path", "label", "answer", "correct", "confidence", *(f"p_{name}" for name in spec.labels))
    probs_NK = _probabilities(spec, evaluation.logits_NK)
    for sample, row_k in zip(evaluation.pictures.samples, probs_NK, strict=True):
        answer = int(row_k.argmax())
        numbers = [f"{p:.8g}" for p in (row_k[answer], *row_k)]
        yield (sample.id, spec.labels[sample.label], spec.labels[answer], int(answer == sample.label), *numbers)


def _score_rows(spec: ModelSpec, evaluation: Evaluation) -> Iterator[tuple[object, ...]]:
    yield ("path", "score", "answer", "error")
    truth_N, answers_N = _truth_and_answers(spec, evaluation.pictures, evaluation.logits_NK)
    for sample, truth, answer in zip(evaluation.pictures.samples, truth_N, answers_N, strict=True):
        yield (sample.id, *(f"{number:.8g}" for number in (truth, answer, answer - truth)))


def write_mistakes(
    folder: Path, network: torch.nn.Module, spec: ModelSpec, evaluation: Evaluation, most: int
) -> list[dict[str, Any]]:
    """Write the most confident mistakes: mistakes.json, and for each a small picture and where the network looked.

    Args:
        folder: to write into; `mistakes/1.jpg` and `mistakes/1-cam.jpg` are the worst.
        network: in eval mode, on the CPU.
        spec: of the network.
        evaluation: of the network.
        most: how many at most.

    Returns:
        Of each, worst first (most confident, or farthest off): path, label, answer, confidence, picture, cam.

    Raises:
        MartenError: the folder cannot be written.
    """
    is_score = spec.task == "regression"
    if is_score:
        truth_N, answers_N = _truth_and_answers(spec, evaluation.pictures, evaluation.logits_NK)
        worst = np.argsort(-np.abs(answers_N - truth_N), kind="stable")[:most]
    else:
        probs_NK = _probabilities(spec, evaluation.logits_NK)
        answers_N, confidence_N = probs_NK.argmax(1).astype(np.float64), probs_NK.max(1)
        wrong = np.flatnonzero(answers_N != evaluation.labels_N)
        worst = wrong[np.argsort(-confidence_N[wrong], kind="stable")][:most]
    told = []
    for number, place in enumerate(worst, 1):
        sample, answer = evaluation.pictures.samples[place], answers_N[place]
        picture = spec.preprocess.read(sample.source())
        pixels_HWC = spec.preprocess.pixels(picture)
        seen = overlay(pixels_HWC, heat_map(network, spec, pixels_HWC, 0 if is_score else int(answer))[0])
        picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
        seen.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
        files = (f"mistakes/{number}.jpg", f"mistakes/{number}-cam.jpg")
        for name, image in zip(files, (picture, seen), strict=True):
            with replacing(folder / name) as neighbour:
                image.save(neighbour, format="JPEG", quality=85)
        told.append(
            {
                "path": sample.id,
                "label": f"{sample.score:.2f}" if is_score else spec.labels[sample.label],
                "answer": f"{answer:.2f}" if is_score else spec.labels[int(answer)],
                "confidence": None if is_score else float(confidence_N[place]),
                "picture": files[0],
                "cam": files[1],
            }
        )
    write_text(folder / "mistakes.json", json.dumps(told, indent=1) + "\n")
    return told


def _truth_and_answers(spec: ModelSpec, pictures: PictureSet, logits_NK: Floats) -> tuple[Floats, Floats]:
    truth_N = np.array([s.score for s in pictures.samples], dtype=np.float64)
    answers_N = [answer["score"] for answer in spec.answers(torch.from_numpy(logits_NK))]
    return truth_N, np.array(answers_N, dtype=np.float64)


def _probabilities(spec: ModelSpec, logits_NK: Floats) -> Floats:
    # by the contract's own function: the rows are what the server answers
    probs: Floats = spec.probabilities(torch.from_numpy(logits_NK).float()).double().numpy()
    return probs
