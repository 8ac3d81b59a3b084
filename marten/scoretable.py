"""Pictures with a score each: read from a table, split evenly over the range, scaled by the training part alone.

A table (.csv or .tsv) has the columns path and score, and no label. Place Pulse's qscores.tsv becomes such a table by
`scripts/data scores`: it names pictures by a location in their file name, and has one row per place and study.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from marten.datasets import SUFFIXES, PictureSet, Sample
from marten.errors import DataError

LAYOUT = "scores"
_STRATA = 10


def has_scores(root: Path) -> bool:
    """Whether this is a table of scores: it has the column score, and no column label."""
    if not root.is_file() or root.suffix.lower() not in (".csv", ".tsv"):
        return False
    columns = set(_reader(root).fieldnames or ())
    return "score" in columns and "label" not in columns


def find_scores(table: Path) -> PictureSet:
    """List the pictures of a table of scores without opening one; what has no score is left out and counted.

    Returns:
        The set; a sample's label is the tenth of the scores it lies in, by which the split is stratified.

    Raises:
        DataError: no columns path and score, fewer than two scores, or all equal.
    """
    reader = _reader(table)
    if not {"path", "score"} <= set(reader.fieldnames or ()):
        raise DataError(f"{table} has the columns {reader.fieldnames}: it needs path and score")
    found: dict[str, float] = {}
    votes: dict[str, float] = {}
    rejected: list[tuple[str, str]] = []
    for line, row in enumerate(reader, 2):
        id_, score = (row["path"] or "").strip(), _number(row["score"])
        if not id_:
            rejected.append((f"line {line}", "no path in the table"))
        elif score is None:
            rejected.append((id_, "no score in the table"))
        elif id_ in found:
            rejected.append((id_, f"listed again in line {line}"))
        elif not (table.parent / id_).is_file():
            rejected.append((id_, "no such file"))
        else:
            found[id_] = score
            votes[id_] = max(0.0, _number(row.get("votes")) or 0.0)
    if len(set(found.values())) < 2:
        raise DataError(f"{table} holds {len(found)} usable scores, {len(set(found.values()))} of them distinct")
    strata = min(_STRATA, max(2, len(found) // _STRATA))
    ranked = sorted(found, key=lambda id_: (found[id_], id_))
    stratum = {id_: rank * strata // len(ranked) for rank, id_ in enumerate(ranked)}
    samples = [Sample(id_, table.parent / id_, stratum[id_], "", score, votes[id_]) for id_, score in found.items()]
    labels = tuple(f"{k + 1} of {strata}" for k in range(strata))
    return PictureSet(table, LAYOUT, labels, tuple(sorted(samples, key=lambda s: s.id)), tuple(sorted(rejected)))


@dataclass(frozen=True)
class Scale:
    """Two pairs of ends: scores of the table from `low` to `high` become answers from `least` to `most`."""

    low: float
    high: float
    least: float
    most: float

    def apply(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their scores on the new scale; one beyond the ends stays beyond them."""
        step = (self.most - self.least) / (self.high - self.low)
        return [replace(s, score=self.least + (_score(s) - self.low) * step) for s in samples]


def fit_scale(training: Sequence[Sample], score_range: tuple[float, ...]) -> Scale | None:
    """The scale on which the training part's least score is the range's first number and its greatest the second.

    None for an empty range: answers then are in the units of the table.
    """
    if not score_range:
        return None
    scores = [_score(s) for s in training]
    return Scale(min(scores), max(scores), *score_range)


def standard_of(training: Sequence[Sample]) -> tuple[float, float]:
    """(mean, standard deviation) of the training part's scores.

    Raises:
        DataError: they are all equal.
    """
    scores = [_score(s) for s in training]
    spread = statistics.pstdev(scores)
    if not spread:
        raise DataError(f"all {len(scores)} pictures of the training part have the score {scores[0]:g}")
    return statistics.fmean(scores), spread


# ------------------------------------------------------------------------------------------------- Place Pulse


def convert_place_pulse(qscores: Path, pictures: Path, study: str) -> tuple[str, dict[str, int]]:
    """Join Place Pulse's scores of one study with the pictures that are here.

    Args:
        qscores: tab-separated, with the columns location_id, study_id, trueskill.score and num_votes.
        pictures: folder of files called LATITUDE_LONGITUDE_<location_id>_CITY.JPG.
        study: identifier of one perception, for instance 50a68a51fdc9f05596000002.

    Returns:
        (table as CSV text: path, score, votes; counts of rows, other_study, no_votes, no_picture and kept).

    Raises:
        DataError: columns are missing, or the study is not in the file; lists those that are.
    """
    by_location: dict[str, str] = {}
    for path in sorted(pictures.rglob("*")):
        match = re.fullmatch(r"[^_]+_[^_]+_([^_]+)_.*", path.name)
        if match and path.suffix.lower() in SUFFIXES:
            by_location.setdefault(match[1], path.relative_to(pictures).as_posix())
    reader = _reader(qscores)
    needed = {"location_id", "study_id", "trueskill.score", "num_votes"}
    if not needed <= set(reader.fieldnames or ()):
        raise DataError(f"{qscores} has the columns {reader.fieldnames}: it needs {', '.join(sorted(needed))}")
    counts = dict.fromkeys(("rows", "other_study", "no_votes", "no_picture", "kept"), 0)
    studies: set[str] = set()
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(("path", "score", "votes"))
    for row in reader:
        counts["rows"] += 1
        studies.add(row["study_id"])
        score, votes = _number(row["trueskill.score"]), _number(row["num_votes"])
        picture = by_location.get(row["location_id"])
        if row["study_id"] != study:
            counts["other_study"] += 1
        elif score is None or not votes:
            counts["no_votes"] += 1
        elif picture is None:
            counts["no_picture"] += 1
        else:
            counts["kept"] += 1
            writer.writerow((picture, repr(score), int(votes)))
    if study not in studies:
        raise DataError(f"{qscores} holds no study {study!r}: there are {', '.join(sorted(studies)) or 'none'}")
    return rows.getvalue(), counts


def _reader(table: Path) -> csv.DictReader[str]:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {table}: {error}") from error
    return csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if table.suffix.lower() == ".tsv" else ",")


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _score(sample: Sample) -> float:
    assert sample.score is not None
    return sample.score
