"""Evaluate a table of profiles: all measures at once, their tables, and one page that shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from marten.cells import evaluation
from marten.cells.errors import CellsError
from marten.cells.evaluation_page import write_page
from marten.cells.index import PLATE, WELL
from marten.cells.tables import Table, feature_columns, feature_matrix, find_column, write_profiles
from marten.files import write_text

NEIGHBOURS = (1, 3, 5, 10)
QUANTILES = (0.995, 0.98, 0.95)


@dataclass
class Evaluation:
    """What the profiles are worth.

    Attributes:
        about: which columns, how many rows.
        measures: one number each, or a note why there is none.
        tables: by name; each is also a CSV file.
        folder: where everything was written.
    """

    folder: Path
    about: dict[str, Any]
    measures: dict[str, float | int | str] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report as text."""
        told = [f"{key}: {value}" for key, value in self.about.items()]
        for name, value in self.measures.items():
            told.append(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
        return [*told, f"page: {self.folder / 'report.html'}"]


def evaluate_profiles(
    table: Table,
    folder: Path,
    *,
    treatment: str,
    control: Any = None,
    group: str | None = None,
    across: str | None = None,
    metric: str = "cosine",
    null_size: int = 10_000,
    seed: int = 0,
) -> Evaluation:
    """Evaluate profiles and write tables and a page.

    Args:
        table: of normalised profiles, wells or sites.
        folder: to write to.
        treatment: column whose equal values are replicates.
        control: its value in the controls; None leaves out what needs controls.
        group: column of a larger group, a mechanism for instance; None leaves out what needs one.
        across: column (mostly Metadata_Plate) within which replicates do not count, for consistency.
        metric: "cosine", "pearson" or "spearman".
        null_size: permutations behind each p value.
        seed: of the permutations.

    Raises:
        CellsError: a column is missing, or no two profiles are replicates.
    """
    where = "the table"
    treatment = find_column(table, treatment, where)
    group = find_column(table, group, where) if group else None
    across = find_column(table, across, where) if across else None
    done = Evaluation(
        folder,
        {
            "profiles": len(table),
            "features": len(feature_columns(table)),
            "treatments": f"{table[treatment].nunique()} in {treatment}",
            "controls": "none" if control is None else f"{treatment} == {control!r}",
            "similarity": metric,
        },
    )
    similarity = evaluation.similarities(feature_matrix(table), metric)
    labels = evaluation.group_labels(table, [treatment])
    _measure_neighbours(done, similarity, labels)
    options = {"null_size": null_size, "seed": seed}
    if control is not None:
        _try(done, "activity mAP", lambda: _activity(done, table, treatment, control, options))
        _try(done, "grit", lambda: _grit(done, table, similarity, labels, treatment, control))
    _try(done, "consistency mAP", lambda: _consistency(done, table, treatment, across, options, "consistency"))
    if group:
        _try(done, f"{group} mAP", lambda: _consistency(done, table, str(group), across, options, "group"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in done.tables.items():
        write_profiles(folder / f"{name}.csv", content)
    plain = {key: (None if isinstance(v, float) and not math.isfinite(v) else v) for key, v in done.measures.items()}
    write_text(folder / "metrics.json", json.dumps({**done.about, **plain}, indent=2) + "\n")
    write_page(
        folder / "report.html", done.about, done.measures, done.tables, similarity, labels, feature_matrix(table)
    )
    return done


def _try(done: Evaluation, name: str, compute: Callable[[], None]) -> None:
    """What cannot be computed from these profiles is told in its place; the rest stands."""
    try:
        compute()
    except CellsError as error:
        done.measures[name] = f"not computed: {error}"


def _measure_neighbours(done: Evaluation, similarity: Any, labels: Any) -> None:
    import pandas as pd

    for quantile in (0.5, 0.95):
        found = evaluation.replicate_reproducibility(similarity, labels, quantile)
        done.measures[f"replicate reproducibility at {quantile}"] = float(found["value"])
    done.measures["replicate pairs"] = int(found["pairs"])
    ks = [k for k in NEIGHBOURS if k < len(labels)]
    for k in ks:
        done.measures[f"precision@{k}"] = evaluation.precision_at(similarity, labels, k)
        done.measures[f"hit@{k}"] = evaluation.hit_at(similarity, labels, k)
    done.tables["precision_recall"] = pd.concat(
        [evaluation.precision_recall(similarity, labels, k) for k in ks], ignore_index=True
    )
    done.tables["enrichment"] = evaluation.enrichment(similarity, labels, QUANTILES)
    ranks = evaluation.hit_ranks(similarity, labels)
    done.tables["hits"] = pd.DataFrame(
        {"percent": p, "hits_over_chance": evaluation.hits_over_chance(ranks, len(labels), p)}
        for p in (1, 2, 5, 10, 25)
    )


def _activity(done: Evaluation, table: Table, treatment: str, control: Any, options: dict[str, Any]) -> None:
    found = evaluation.activity(table, treatment, control, **options)
    done.tables["activity"] = _plain(found)
    done.measures["activity mAP"] = float(found["mean_average_precision"].mean())
    done.measures["active treatments"] = int(found["below_corrected_p"].sum())


def _consistency(
    done: Evaluation, table: Table, column: str, across: str | None, options: dict[str, Any], name: str
) -> None:
    found = evaluation.consistency(table, column, across, **options)
    done.tables[name] = _plain(found)
    title = "consistency mAP" if name == "consistency" else f"{column} mAP"
    done.measures[title] = float(found["mean_average_precision"].mean())


def _grit(done: Evaluation, table: Table, similarity: Any, labels: Any, treatment: str, control: Any) -> None:
    profiles = evaluation.group_labels(table, [PLATE, WELL] if WELL in table.columns else [treatment])
    controls = (table[treatment].astype(str) == str(control)).to_numpy()
    found = evaluation.grit(similarity, profiles, labels, controls)
    done.tables["grit"] = found
    treated = found[found["group"] != str(control)]["grit"]
    if treated.notna().any():
        done.measures["grit"] = float(np.nanmean(treated))


def _plain(found: Table) -> Table:
    """Without the columns of lists, which no CSV reader takes apart again."""
    keep = [name for name in found.columns if not isinstance(found[name].iloc[0], (list, tuple, np.ndarray))]
    return found[keep]
