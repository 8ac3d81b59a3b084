"""Make profiles of different plates comparable: sphering on the controls, or pycytominer's methods; then select."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marten.cells.errors import CellsError
from marten.cells.tables import Table, feature_columns, feature_matrix, find_column, metadata_columns

METHODS = ("sphering", "standardize", "robustize", "mad_robustize", "spherize", "none")
OPERATIONS = ("variance_threshold", "correlation_threshold", "drop_na_columns", "blocklist", "drop_outliers")
REGULARISATION = 1e-3


@dataclass
class NormalizeReport:
    """What a normalisation did: features before and after, and what was left out with its reason."""

    rows: int = 0
    before: int = 0
    after: int = 0
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text."""
        return [f"{self.rows} profiles, {self.before} features before and {self.after} after", *self.notes]


@dataclass(frozen=True)
class Sphering:
    """A whitening transform fitted on control profiles: there, features become uncorrelated and of variance 1.

    Attributes:
        mean: of the controls, of shape (features,).
        whitening: (features, features), symmetric (ZCA): a profile keeps its own axes.
    """

    mean: NDArray[np.float64]
    whitening: NDArray[np.float64]

    @classmethod
    def fit(cls, controls: NDArray[np.float64], regularisation: float = REGULARISATION) -> Sphering:
        """Fit on profiles of shape (controls, features); `regularisation` is added to every variance.

        Source: DeepProfilerExperiments; W = V diag(1 / sqrt(s + reg)) V' with C = X'X / n = V diag(s) V'.
        """
        mean = controls.mean(axis=0)
        centred = controls - mean
        variances, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
        scales = 1.0 / np.sqrt(np.maximum(variances, 0) + regularisation)
        return cls(mean, (vectors * scales) @ vectors.T)

    def apply(self, profiles: NDArray[np.float64]) -> NDArray[np.float64]:
        """Transform profiles of shape (rows, features)."""
        return (profiles - self.mean) @ self.whitening


def normalize_profiles(
    table: Table,
    method: str = "sphering",
    *,
    controls: tuple[str, Any] | None = None,
    per: str | None = None,
    regularisation: float = REGULARISATION,
) -> tuple[Table, NormalizeReport]:
    """Normalise a table of profiles.

    Args:
        table: of wells or sites.
        method: "sphering" (regularised, on the controls), one of pycytominer's "standardize", "robustize",
            "mad_robustize", "spherize", or "none".
        controls: (column, value) of the rows to fit on; None fits on all rows.
        per: column within whose groups each is fitted and applied, mostly Metadata_Plate; None takes the whole table.
        regularisation: of "sphering".

    Returns:
        The normalised table, and what was done.

    Raises:
        CellsError: an unknown method, a column that is missing, or a group without controls.
    """
    import pandas as pd

    if method not in METHODS:
        raise CellsError(f"no method {method!r}: choose one of {', '.join(METHODS)}")
    report = NormalizeReport(rows=len(table), before=len(feature_columns(table)))
    table = table.reset_index(drop=True)
    feature_matrix(table)
    if method == "none":
        report.after = report.before
        return table, report
    groups = (
        [table]
        if per is None
        else [part for _, part in table.groupby(find_column(table, per, "the table"), sort=False)]
    )
    fits = [_control_rows(part, controls, per) for part in groups]
    if method in ("robustize", "mad_robustize", "standardize"):
        table, groups, fits = _without_flat(table, groups, fits, method, report)
    done = []
    for part, chosen in zip(groups, fits, strict=True):
        if method == "sphering":
            done.append(_sphere(part, chosen, regularisation))
        else:
            done.append(_pycytominer(part, chosen, method))
    out = pd.concat(done).sort_index().reset_index(drop=True)
    report.after = len(feature_columns(out))
    return out, report


def select_features(table: Table, operations: Sequence[str]) -> tuple[Table, NormalizeReport]:
    """Leave out features by pycytominer's rules.

    Raises:
        CellsError: an unknown rule, or no feature is left.
    """
    unknown = [name for name in operations if name not in OPERATIONS]
    if unknown:
        raise CellsError(f"no rule {unknown[0]!r} of feature selection: choose of {', '.join(OPERATIONS)}")
    import pycytominer

    features = feature_columns(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = pycytominer.feature_select(table, features=features, operation=list(operations))
    left = feature_columns(out)
    if not left:
        raise CellsError(f"{', '.join(operations)} leaves none of {len(features)} features: take fewer rules")
    return out, NormalizeReport(len(out), len(features), len(left))


def _control_rows(part: Table, controls: tuple[str, Any] | None, per: str | None) -> NDArray[np.bool_]:
    if controls is None:
        return np.ones(len(part), bool)
    column, value = controls
    column = find_column(part, column, "the table")
    chosen = np.asarray(part[column].astype(str) == str(value))
    if chosen.sum() < 2:
        where = "" if per is None else f" in {per} {part[find_column(part, per, 'the table')].iloc[0]}"
        raise CellsError(
            f"{int(chosen.sum())} rows{where} have {column} == {value!r}: at least two controls are needed to fit on; "
            "set dataset.metadata.control_value, or fit on all rows with --samples all"
        )
    return chosen


def _sphere(part: Table, chosen: NDArray[np.bool_], regularisation: float) -> Table:
    features = feature_columns(part)
    values = feature_matrix(part, features)
    return _replaced(part, features, Sphering.fit(values[chosen], regularisation).apply(values))


def _replaced(part: Table, features: Sequence[str], values: NDArray[np.float64]) -> Table:
    import pandas as pd

    fresh = pd.DataFrame(values, columns=list(features), index=part.index)
    return pd.concat([part[metadata_columns(part)], fresh], axis=1)


def _pycytominer(part: Table, chosen: NDArray[np.bool_], method: str) -> Table:
    import pycytominer

    features = feature_columns(part)
    marked = part.assign(Metadata_fit_on=np.where(chosen, "yes", "no"))
    metadata = metadata_columns(marked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = pycytominer.normalize(
            marked,
            features=features,
            meta_features=metadata,
            samples="Metadata_fit_on == 'yes'",
            method=method,
        )
    return _replaced(part, features, np.asarray(out[features].to_numpy(), np.float64))


def _without_flat(
    table: Table,
    groups: Sequence[Table],
    fits: Sequence[NDArray[np.bool_]],
    method: str,
    report: NormalizeReport,
) -> tuple[Table, list[Table], list[NDArray[np.bool_]]]:
    """Leave out features without spread among the rows that are fitted on: dividing by it would blow them up."""
    features = feature_columns(table)
    flat = np.zeros(len(features), bool)
    for part, chosen in zip(groups, fits, strict=True):
        values = feature_matrix(part, features)[chosen]
        spread = _spread(values, method)
        flat |= spread <= 1e-9 * np.maximum(np.abs(values).max(axis=0), 1e-30)
    gone = [name for name, is_flat in zip(features, flat, strict=True) if is_flat]
    if len(gone) == len(features):
        raise CellsError("no feature varies among the rows that are fitted on: fit on more rows, or use sphering")
    if gone:
        report.notes.append(f"{len(gone)} features without spread among those rows left out: {', '.join(gone[:4])}")
    return table.drop(columns=gone), [part.drop(columns=gone) for part in groups], list(fits)


def _spread(values: NDArray[np.float64], method: str) -> NDArray[np.float64]:
    if method == "standardize":
        return np.asarray(values.std(axis=0))
    if method == "robustize":
        return np.asarray(np.subtract(*np.percentile(values, (75, 25), axis=0)))
    return np.asarray(np.median(np.abs(values - np.median(values, axis=0)), axis=0))
