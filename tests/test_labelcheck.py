"""Wrong labels are found among right ones by fits that never saw them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from marten.architectures import find_architecture
from marten.datasets import PictureSet, Sample
from marten.labelcheck import features_of, out_of_fold, suspects, suspects_table
from marten.weights import load_model
from tests.pictures import draw, encode


def clouds(wrong: int, classes: int = 3, count: int = 240) -> tuple[np.ndarray, np.ndarray, set[int]]:
    rng = np.random.default_rng(1)
    labels_N = rng.integers(0, classes, count)
    features_NK = rng.normal(0, 1, (count, 12)) + 3 * np.eye(classes, 12)[labels_N]
    places = rng.choice(count, wrong, replace=False)
    labels_N[places] = (labels_N[places] + 1) % classes
    return features_NK, labels_N, set(places.tolist())


def test_wrong_labels_come_first() -> None:
    features_NK, labels_N, wrong = clouds(12)
    probs_NK = out_of_fold(features_NK, labels_N, 3)
    np.testing.assert_allclose(probs_NK.sum(1), 1)
    found = suspects(labels_N, probs_NK)
    assert len(wrong & set(found[:14])) >= 10
    assert len(found) < 30


def test_right_labels_are_left_alone() -> None:
    features_NK, labels_N, _ = clouds(0)
    assert len(suspects(labels_N, out_of_fold(features_NK, labels_N, 3))) <= 8


def test_a_picture_is_not_judged_by_its_own_copy() -> None:
    """A wrong label borne by two equal pictures is still found."""
    features_NK, labels_N, _ = clouds(0)
    features_NK, labels_N = np.vstack([features_NK, features_NK[:1]]), np.append(labels_N, labels_N[0])
    labels_N[[0, -1]] = (labels_N[0] + 1) % 3
    found = suspects(labels_N, out_of_fold(features_NK, labels_N, 3))
    assert {0, len(labels_N) - 1} <= set(found)


def test_features_are_what_the_head_is_given(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    network, card = load_model(tiny_model("resnet18"))
    samples = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        path.write_bytes(encode(draw(number), "PNG"))
        samples.append(Sample(path.name, path, number % 2))
    found = features_of(network, find_architecture("resnet18").head, card.spec, samples)
    assert found.shape == (4, 512)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-9)
    table = suspects_table(
        PictureSet(tmp_path, "flat", ("a", "b"), tuple(samples)),
        np.array([0, 1, 0, 1]),
        np.array([[0.9, 0.1], [0.2, 0.8], [0.05, 0.95], [0.1, 0.9]]),
    )
    assert [(r["path"], r["label"], r["likelier"]) for r in csv.DictReader(io.StringIO(table))] == [("2.png", "a", "b")]
