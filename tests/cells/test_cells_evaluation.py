"""Measures agree with the numbers that cytominer-eval's own tests expect on a real plate of compounds."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from marten.cells import evaluation
from marten.cells.errors import CellsError
from marten.cells.evaluate import evaluate_profiles
from marten.cells.tables import feature_columns, feature_matrix


@pytest.fixture(scope="module")
def compounds(painting):
    return pd.read_csv(painting / "profiles/SQ00015054_normalized_feature_select.csv.gz", low_memory=False)


@pytest.fixture(scope="module")
def pearson(compounds):
    return evaluation.similarities(feature_matrix(compounds))


@pytest.mark.parametrize(("metric", "half", "most"), [("pearson", 0.681, 0.458), ("spearman", 0.679, 0.466)])
def test_replicate_reproducibility_as_published(compounds, metric, half, most):
    similarity = evaluation.similarities(feature_matrix(compounds), metric)
    labels = evaluation.group_labels(compounds, ["Metadata_broad_sample", "Metadata_mg_per_ml"])
    found = [evaluation.replicate_reproducibility(similarity, labels, q)["value"] for q in (0.5, 0.95)]
    assert [round(value, 3) for value in found] == [half, most]


@pytest.mark.parametrize(("k", "precise", "complete"), [(1, 18, 0), (5, 9, 0), (10, 5, 0), (50, 2, 1), (5000, 0, 58)])
def test_precision_and_recall_as_published(compounds, pearson, k, precise, complete):
    labels = evaluation.group_labels(compounds, ["Metadata_broad_sample"])
    table = evaluation.precision_recall(pearson, labels, k)
    assert ((table["precision"] == 1).sum(), (table["recall"] == 1).sum()) == (precise, complete)


def test_hits_as_published(compounds, pearson):
    labels = np.asarray(compounds["Metadata_moa"].fillna("unknown"), dtype=np.str_)
    ranks = evaluation.hit_ranks(pearson, labels)
    counts = pd.Series(labels).value_counts()
    assert len(ranks) == (counts * (counts - 1)).sum()
    assert {p: evaluation.hits_over_chance(ranks, 384, p) for p in (2, 5, 10, 100)} == {
        2: 690,
        5: 984,
        10: 1147,
        100: 0,
    }
    assert (ranks.min(), ranks.max()) == (0, 382)


def test_grit_as_published(compounds, pearson):
    samples = evaluation.group_labels(compounds, ["Metadata_broad_sample"])
    groups = evaluation.group_labels(compounds, ["Metadata_moa"])
    best = evaluation.grit(pearson, samples, groups, samples == "DMSO").sort_values("grit").dropna().iloc[-1]
    assert round(best["grit"], 4) == 0.9990
    assert (best["perturbation"], best["group"]) == ("BRD-A94756469-001-04-7", "ATPase inhibitor")


def test_enrichment_falls_with_the_quantile(compounds, pearson):
    labels = evaluation.group_labels(compounds, ["Metadata_broad_sample"])
    table = evaluation.enrichment(pearson, labels, (0.995, 0.97, 0.9))
    assert list(table["odds_ratio"]) == sorted(table["odds_ratio"], reverse=True)
    assert (table["p_value"] < 1e-6).all()


def test_the_whole_evaluation_of_a_real_plate(compounds, tmp_path):
    done = evaluate_profiles(compounds, tmp_path, treatment="broad_sample", control="DMSO", group="moa", null_size=1000)
    assert done.measures["activity mAP"] > 0.5
    assert 20 < done.measures["active treatments"] < 58
    assert 0 < done.measures["Metadata_moa mAP"] < 1
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["profiles"] == 384
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64") == 3
    assert "http" not in page
    assert {"activity.csv", "grit.csv", "group.csv", "precision_recall.csv"} <= {p.name for p in tmp_path.iterdir()}


def toy():
    """Three treatments of three wells, each in a direction of its own, and three controls around nothing."""
    rng = np.random.default_rng(0)
    directions = np.eye(4, 8) * 5
    directions[0] = 0
    values = np.repeat(directions, 3, axis=0) + rng.normal(size=(12, 8)) * 0.3
    table = pd.DataFrame(values, columns=[f"f_{i}" for i in range(8)])
    table.insert(0, "Metadata_Plate", ["A", "B", "C"] * 4)
    table.insert(1, "Metadata_Well", [f"w{i}" for i in range(12)])
    table.insert(2, "Metadata_pert", np.repeat(["DMSO", "x", "y", "z"], 3))
    return table


def test_clear_treatments_are_found_clearly(tmp_path):
    done = evaluate_profiles(toy(), tmp_path, treatment="pert", control="DMSO", across="Metadata_Plate", null_size=500)
    assert done.measures["activity mAP"] == 1
    consistent = done.tables["consistency"].set_index("Metadata_pert")["mean_average_precision"]
    assert (consistent[["x", "y", "z"]] == 1).all()
    assert done.measures["grit"] > 2
    similarity = evaluation.similarities(feature_matrix(toy()), "cosine")
    labels = evaluation.group_labels(toy(), ["Metadata_pert"])
    treated = labels != "DMSO"
    assert evaluation.precision_at(similarity[treated][:, treated], labels[treated], 2) == 1
    assert evaluation.hit_at(similarity[treated][:, treated], labels[treated], 1) == 1


def test_what_cannot_be_computed_is_told_and_the_rest_stands(tmp_path):
    done = evaluate_profiles(toy(), tmp_path, treatment="pert", control="water", null_size=100)
    assert done.measures["activity mAP"].startswith("not computed: no profile has Metadata_pert == 'water'")
    assert done.measures["grit"].startswith("not computed")
    assert done.measures["precision@1"] > 0.5
    assert (tmp_path / "report.html").is_file()


def test_profiles_that_cannot_be_compared():
    table = toy()
    with pytest.raises(CellsError, match="no replicate pairs"):
        evaluation.replicate_reproducibility(np.eye(3), np.array(["a", "b", "c"]))
    table.loc[4, feature_columns(table)] = 1.0
    with pytest.raises(CellsError, match="row 6 is constant"):
        evaluation.similarities(feature_matrix(table))
    with pytest.raises(CellsError, match="no similarity 'euclid'"):
        evaluation.similarities(feature_matrix(table), "euclid")


def test_a_row_without_a_value_is_nobodys_replicate():
    labels = evaluation.group_labels(pd.DataFrame({"a": ["x", None, float("nan"), "", "x"]}), ["a"])
    assert len(set(labels)) == 4
    assert labels[0] == labels[4]
