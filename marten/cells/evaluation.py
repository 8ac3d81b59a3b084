"""How much of a treatment's effect its profiles hold: whether replicates find each other among all the others.

Every measure starts from one matrix of similarities between profiles. Definitions are those of cytominer-eval, which
no longer installs; the numbers agree with those that its own tests expect. Mean average precision is copairs'.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marten.cells.errors import CellsError
from marten.cells.tables import Table, feature_columns, feature_matrix

MOST_ROWS = 20_000
"""Profiles compared with each other at once: beyond it the matrix takes more than 3 GB."""
Labels = NDArray[np.str_]


def similarities(profiles: NDArray[np.float64], metric: str = "pearson") -> NDArray[np.float64]:
    """Similarity of every profile with every other, 1 on the diagonal.

    Args:
        profiles: (rows, features).
        metric: "pearson", "spearman" or "cosine".

    Raises:
        CellsError: an unknown metric, too many rows, or a profile without direction.
    """
    if len(profiles) > MOST_ROWS:
        raise CellsError(
            f"{len(profiles)} profiles cannot be compared at once (at most {MOST_ROWS}): aggregate to wells"
        )
    if metric == "spearman":
        from scipy.stats import rankdata

        profiles = np.asarray(rankdata(profiles, axis=1), np.float64)
    elif metric not in ("pearson", "cosine"):
        raise CellsError(f"no similarity {metric!r}: choose pearson, spearman or cosine")
    centred = profiles if metric == "cosine" else profiles - profiles.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    if (lengths == 0).any():
        raise CellsError(f"the profile in row {int(np.argmin(lengths)) + 2} is constant: it is similar to nothing")
    unit = centred / lengths
    return np.asarray(np.clip(unit @ unit.T, -1, 1))


def group_labels(table: Table, columns: Sequence[str]) -> Labels:
    """What makes two rows replicates, as one text per row; a row without a value is nobody's replicate."""
    labels = []
    for number, values in enumerate(table[list(columns)].itertuples(index=False)):
        lacking = any(value is None or value != value or value == "" for value in values)
        labels.append(f"row {number} alone" if lacking else "\t".join(map(str, values)))
    return np.asarray(labels, dtype=np.str_)


def replicate_reproducibility(
    similarity: NDArray[np.float64], labels: Labels, quantile: float = 0.95
) -> dict[str, float | int]:
    """Share of replicate pairs that are more similar than a quantile of all other pairs ("percent replicating").

    Returns:
        value, pairs (how many replicate pairs), threshold (the quantile's similarity).

    Raises:
        CellsError: no two rows are replicates.
    """
    upper = np.triu_indices(len(similarity), k=1)
    values = similarity[upper]
    same = labels[upper[0]] == labels[upper[1]]
    if not same.any() or same.all():
        raise CellsError("no replicate pairs to compare: every profile is alone in its group, or all are in one")
    threshold = float(np.quantile(values[~same], quantile))
    return {"value": float((values[same] > threshold).mean()), "pairs": int(same.sum()), "threshold": threshold}


def precision_recall(similarity: NDArray[np.float64], labels: Labels, k: int) -> Table:
    """Precision and recall among the k most similar pairs that start in each group.

    Returns:
        One row per group that has replicates: group, k, precision, recall.
    """
    import pandas as pd

    rows = []
    order = np.arange(len(labels))
    for group in np.unique(labels):
        members = np.flatnonzero(labels == group)
        values = similarity[members]
        mine = (labels[None, :] == group) & (order[None, :] != members[:, None])
        others = order[None, :] != members[:, None]
        values, hits = values[others], np.broadcast_to(mine, values.shape)[others]
        best = np.argsort(-values, kind="stable")[:k]
        total = int(hits.sum())
        if total:
            found = int(hits[best].sum())
            rows.append({"group": group, "k": k, "precision": found / k, "recall": found / total})
    return pd.DataFrame(rows, columns=["group", "k", "precision", "recall"])


def precision_at(similarity: NDArray[np.float64], labels: Labels, k: int = 1) -> float:
    """Mean share of replicates among the k nearest neighbours of each profile that has any."""
    ranked = _ranked_hits(similarity, labels)
    useful = ranked.any(axis=1)
    return float(ranked[useful, :k].mean()) if useful.any() else float("nan")


def hit_ranks(similarity: NDArray[np.float64], labels: Labels) -> NDArray[np.intp]:
    """Places of replicates among the neighbours of every profile, nearest first from 0, all in one list."""
    return np.nonzero(_ranked_hits(similarity, labels))[1]


def hits_over_chance(ranks: NDArray[np.intp], profiles: int, percent: float) -> int:
    """How many more replicates stand among the nearest `percent` of neighbours than chance would put there."""
    return int((ranks <= int(percent * profiles / 100)).sum()) - int(percent * len(ranks) / 100)


def hit_at(similarity: NDArray[np.float64], labels: Labels, k: int) -> float:
    """Share of profiles, of those that have replicates, with at least one among their k nearest neighbours."""
    ranked = _ranked_hits(similarity, labels)
    useful = ranked.any(axis=1)
    return float(ranked[useful, :k].any(axis=1).mean()) if useful.any() else float("nan")


def grit(similarity: NDArray[np.float64], profiles: Labels, groups: Labels, controls: NDArray[np.bool_]) -> Table:
    """How far above its similarity to controls each perturbation's similarity to others of its group is, in z scores.

    Args:
        similarity: of `similarities`.
        profiles: the perturbation of each row; rows of one perturbation are not compared with each other.
        groups: the larger group (gene, mechanism, or treatment when `profiles` are wells) of each row.
        controls: which rows are controls.

    Returns:
        One row per perturbation: perturbation, group, grit (missing where it is alone in its group).

    Raises:
        CellsError: fewer than two controls.
    """
    import pandas as pd

    if controls.sum() < 2:
        raise CellsError("grit needs at least two control profiles: set dataset.metadata.control_value")
    rows = []
    order = np.arange(len(profiles))
    for name in np.unique(profiles):
        members = np.flatnonzero(profiles == name)
        group = groups[members[0]]
        apart = order[None, :] != members[:, None]
        reference = similarity[members][apart & controls[None, :]]
        target = similarity[members][apart & (groups == group)[None, :] & (profiles != name)[None, :]]
        score = float("nan")
        if len(target) and reference.std() > 0:
            score = float(((target - reference.mean()) / reference.std()).mean())
        rows.append({"perturbation": name, "group": group, "grit": score})
    return pd.DataFrame(rows)


def enrichment(similarity: NDArray[np.float64], labels: Labels, quantiles: Sequence[float] = (0.98, 0.95)) -> Table:
    """Odds of replicates among pairs above a quantile of similarity, over those below it (Fisher's exact test).

    Returns:
        One row per quantile: quantile, threshold, odds_ratio, p_value.
    """
    import pandas as pd
    from scipy.stats import fisher_exact

    apart = ~np.eye(len(labels), dtype=bool)
    values = similarity[apart]
    same = (labels[:, None] == labels[None, :])[apart]
    rows = []
    for quantile in quantiles:
        threshold = float(np.quantile(values, quantile))
        above = values > threshold
        counts = [[(same & above).sum(), (~same & above).sum()], [(same & ~above).sum(), (~same & ~above).sum()]]
        odds, p_value = fisher_exact(counts, alternative="greater")
        rows.append(
            {"quantile": quantile, "threshold": threshold, "odds_ratio": float(odds), "p_value": float(p_value)}
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Retrieval:
    """Whose neighbours count as right and as wrong in mean average precision, in copairs' words."""

    pos_sameby: tuple[str, ...]
    pos_diffby: tuple[str, ...] = ()
    neg_sameby: tuple[str, ...] = ()
    neg_diffby: tuple[str, ...] = ()


def mean_average_precision(
    table: Table, retrieval: Retrieval, *, null_size: int = 10_000, seed: int = 0, threshold: float = 0.05
) -> Table:
    """Mean average precision of every group, with its permutation p value, corrected for their number.

    Args:
        table: of profiles.
        retrieval: which pairs are right, which wrong.
        null_size: permutations behind a p value.
        seed: of the permutations.
        threshold: below which a corrected p value counts.

    Raises:
        CellsError: there are no such pairs.
    """
    from copairs import map as copairs

    metadata = table.drop(columns=feature_columns(table)).reset_index(drop=True)
    values = feature_matrix(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scores: Any = copairs.average_precision(
                metadata,
                values,
                list(retrieval.pos_sameby),
                list(retrieval.pos_diffby),
                list(retrieval.neg_sameby),
                list(retrieval.neg_diffby),
                progress_bar=False,
            )
            scores = scores[scores["average_precision"].notna()]
            if not len(scores):
                raise CellsError("no pair of profiles to retrieve")
            return copairs.mean_average_precision(
                scores, list(retrieval.pos_sameby), null_size, threshold, seed, progress_bar=False, max_workers=1
            )
        except (ValueError, KeyError, IndexError) as error:
            raise CellsError(f"mean average precision cannot be computed: {error}") from error


def activity(table: Table, treatment: str, control: Any, **options: Any) -> Table:
    """Mean average precision of each treatment's replicates against the controls (phenotypic activity)."""
    reference = "Metadata_reference"
    marked = table.reset_index(drop=True).copy()
    is_control = (marked[treatment].astype(str) == str(control)).to_numpy()
    if not is_control.any():
        raise CellsError(f"no profile has {treatment} == {control!r}: set dataset.metadata.control_value")
    # each control is a group of its own, so that controls are wrong answers and never asked for
    marked[reference] = np.where(is_control, np.arange(len(marked)), -1)
    pairs = Retrieval((treatment, reference), (), (), (treatment, reference))
    kept = mean_average_precision(marked, pairs, **options)
    return kept[kept[reference] == -1].drop(columns=reference).reset_index(drop=True)


def consistency(table: Table, group: str, across: str | None = None, **options: Any) -> Table:
    """Mean average precision of each group's members against all others, optionally only across plates.

    Rows without a group are left out: they are nobody's fellows, and nobody knows whose opponents.
    """
    apart = (across,) if across else ()
    known = table[table[group].notna() & (table[group].astype(str) != "")].reset_index(drop=True)
    return mean_average_precision(known, Retrieval((group,), apart, (), (group,)), **options)


def _ranked_hits(similarity: NDArray[np.float64], labels: Labels) -> NDArray[np.bool_]:
    """Whether the n-th nearest neighbour of each row is a replicate: (rows, rows - 1), the row itself left out."""
    values = similarity.copy()
    np.fill_diagonal(values, -np.inf)
    order = np.argsort(-values, axis=1, kind="stable")[:, :-1]
    return np.asarray(labels[order] == labels[:, None])
