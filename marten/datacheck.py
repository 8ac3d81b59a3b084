"""What is to be looked at in a data set before it is trained on: copies, labels that may be wrong, uneven classes.

Each is written as a table, and as a page on which the pictures can be seen.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from marten.datasets import PictureSet, Sample
from marten.errors import DataError, PictureError
from marten.files import write_text
from marten.neighbours import Pair, pairs_table
from marten.pages import gallery, headline, page, scrolling, section, thumbnail

if TYPE_CHECKING:
    from marten.scores import Floats

_SHOWN = 60
"""Pictures, or pairs, that a page shows at most: it then stays below two megabytes."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Findings:
    """What was found in a data set.

    Attributes:
        pictures: the readable ones, with keys.
        pairs: that look alike, the most alike first; None where nobody looked.
        parts: of the split, "train" or "validation" by path; empty where none was told.
        probs_NK: by pictures and classes, as told from outside; None where nobody looked.
    """

    pictures: PictureSet
    pairs: Sequence[Pair] | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    probs_NK: Floats | None = None

    def problem(self, pair: Pair) -> str:
        """What is wrong with two pictures that look alike: "across", "labels", both or nothing."""
        parts = [self.parts.get(sample.id) for sample in (pair.first, pair.second)]
        across = None not in parts and parts[0] != parts[1]
        return " ".join(["across"] * across + ["labels"] * (pair.first.label != pair.second.label))

    @property
    def suspects(self) -> list[int]:
        """Indices of the samples whose label is probably wrong, the most certain first."""
        import numpy as np

        from marten.labelcheck import suspects

        if self.probs_NK is None:
            return []
        return suspects(np.array([s.label for s in self.pictures.samples], dtype=np.int64), self.probs_NK)


def read_parts(split: Path | None) -> dict[str, str]:
    """The part of each path, from the split.csv of a run.

    Raises:
        DataError: no such table.
    """
    if split is None:
        return {}
    try:
        with open(split, newline="", encoding="utf-8") as file:
            return {row["path"]: row["split"] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, KeyError) as error:
        raise DataError(f"{split} is no split.csv of a run, with the columns path and split: {error}") from error


def look_at_labels(pictures: PictureSet, conv_net: str, progress: Progress = lambda done, total: None) -> Floats:
    """Probabilities of each picture's classes by a linear fit on a pretrained network's features, out of fold.

    Raises:
        TrainingError: the network's ImageNet weights are out of reach.
    """
    import numpy as np

    from marten.architectures import build_network, find_architecture
    from marten.labelcheck import features_of, out_of_fold
    from marten.weights import start_weights
    from modelspec import ModelSpec

    looking = find_architecture(conv_net)
    spec = ModelSpec(conv_net, looking.arch, task="embedding", preprocess=looking.preprocess)
    network = build_network(looking.arch, {**looking.arch_args, "num_classes": 2, "dropout": 0.0}).eval()
    start_weights(network, looking, "imagenet")
    features_NK = features_of(network, looking.head, spec, pictures.samples, progress)
    labels_N = np.array([sample.label for sample in pictures.samples], dtype=np.int64)
    return out_of_fold(features_NK, labels_N, len(pictures.labels))


def evenness(counts: Mapping[str, int]) -> dict[str, float]:
    """How even the classes are.

    Returns:
        ratio: pictures of the largest class per picture of the smallest.
        as_many_as: so many classes of one size would be as uncertain (the exponential of the entropy).
        most: accuracy of always answering the largest class.
    """
    total = sum(counts.values())
    shares = [count / total for count in counts.values() if count]
    entropy = -sum(share * math.log(share) for share in shares)
    ratio = max(counts.values()) / max(min(counts.values()), 1)
    return {"ratio": ratio, "as_many_as": math.exp(entropy), "most": max(shares)}


def write_findings(found: Findings, page_path: Path, pairs: Path | None, suspects: Path | None) -> None:
    """Write the page, and the tables that have a place.

    Raises:
        MartenError: a folder cannot be written.
    """
    import numpy as np

    from marten.labelcheck import suspects_table

    if pairs is not None and found.pairs is not None:
        write_text(pairs, pairs_table(found.pairs, found.pictures.labels, dict(found.parts)))
    if suspects is not None and found.probs_NK is not None:
        labels_N = np.array([s.label for s in found.pictures.samples], dtype=np.int64)
        write_text(suspects, suspects_table(found.pictures, labels_N, found.probs_NK))
    write_text(page_path, findings_page(found))


def classes_table(counts: Mapping[str, int]) -> str:
    """The classes as CSV text: label, pictures and their share, the largest first."""
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(("label", "pictures", "share"))
    total = sum(counts.values())
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        writer.writerow((name, count, f"{count / total:.6f}"))
    return rows.getvalue()


def findings_page(found: Findings) -> str:
    """What was found, with the pictures, as one page."""
    pictures = found.pictures
    cells = [("pictures", f"{len(pictures.samples):,}", f"in {len(pictures.labels)} classes")]
    if found.pairs is not None:
        wrong = sum(bool(found.problem(pair)) for pair in found.pairs)
        cells.append(("pairs that look alike", f"{len(found.pairs):,}", f"{wrong} across the split or two labels"))
    if found.probs_NK is not None:
        cells.append(("suspect labels", f"{len(found.suspects):,}", "another class is likelier"))
    cells.append(("left out", f"{len(pictures.rejected):,}", "files that cannot be read as pictures"))
    parts = [_classes(pictures), _pairs(found), _suspects(found), _rejected(pictures)]
    return page(f"{pictures.name}: what to look at", f"digest {pictures.digest[:16]}", headline(cells), parts)


def _classes(pictures: PictureSet) -> str:
    counts = pictures.counts()
    told = evenness(counts)
    most = max(counts.values())
    lines = [
        f"<tr><th scope='row'>{escape(name)}</th><td>{count:,}</td>"
        f"<td class='bar'><i style='--share:{count / most:.4f}'></i></td></tr>"
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
    ]
    heads = "".join(f"<th scope='col'>{name}</th>" for name in ("class", "pictures", "beside the largest"))
    note = (
        f"<p>The largest class has {told['ratio']:.3g} times the pictures of the smallest; they are as even as"
        f" {told['as_many_as']:.1f} classes of one size. Always answering the largest would be right in"
        f" {100 * told['most']:.1f} % of cases.</p>"
    )
    whole = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    more = f"<p class='soft'>and {len(counts) - _SHOWN} smaller ones</p>" if len(counts) > _SHOWN else ""
    return section("Classes", note + scrolling(whole, "pictures of each class") + more)


def _pairs(found: Findings) -> str:
    if not found.pairs:
        return "" if found.pairs is None else section("Pictures that look alike", "<p>None were found.</p>")
    labels = found.pictures.labels
    ranked = sorted(found.pairs, key=lambda pair: -len(found.problem(pair).split()))  # stable: then the most alike
    items = []
    for pair in ranked[:_SHOWN]:
        seen = [_seen(sample) for sample in (pair.first, pair.second)]
        names = [
            ", ".join(filter(None, (labels[s.label], found.parts.get(s.id, "")))) for s in (pair.first, pair.second)
        ]
        told = f"{pair.bits} of 240 bits apart: {names[0]} and {names[1]}"
        problem = {"": "", "across": "on both sides of the split", "labels": "under two labels"}.get(
            found.problem(pair), "under two labels, on both sides of the split"
        )
        items.append((seen, told + (f" – {problem}" if problem else ""), f"{pair.first.id} · {pair.second.id}"))
    return section(
        "Pictures that look alike", _first(len(ranked), "pairs", "those with a problem first") + gallery(items)
    )


def _suspects(found: Findings) -> str:
    probs_NK = found.probs_NK
    if probs_NK is None:
        return ""
    if not found.suspects:
        return section("Labels that may be wrong", "<p>None were found.</p>")
    labels, samples = found.pictures.labels, found.pictures.samples
    items = []
    for i in found.suspects[:_SHOWN]:
        best = int(probs_NK[i].argmax())
        own = float(probs_NK[i, samples[i].label])
        told = f"labelled {labels[samples[i].label]} ({100 * own:.1f} %), looks like {labels[best]}"
        items.append(([_seen(samples[i])], f"{told} ({100 * float(probs_NK[i, best]):.1f} %)", samples[i].id))
    note = _first(len(found.suspects), "labels", "the most certain first")
    return section("Labels that may be wrong", note + gallery(items))


def _rejected(pictures: PictureSet) -> str:
    if not pictures.rejected:
        return ""
    lines = [f"<li>{escape(id_)}: {escape(reason)}</li>" for id_, reason in pictures.rejected[:_SHOWN]]
    note = _first(len(pictures.rejected), "files", "by name")
    return section("Files that are left out", f"{note}<ul>{''.join(lines)}</ul>")


def _first(count: int, what: str, order: str) -> str:
    shown = f"the first {_SHOWN} of {count:,}" if count > _SHOWN else f"all {count:,}"
    return f"<p class='soft'>{shown.capitalize()} {what}, {order}.</p>"


def _seen(sample: Sample) -> tuple[str, str]:
    try:
        return thumbnail(sample.source()), sample.id
    except PictureError as error:  # it could be read a moment ago
        return "data:,", f"{sample.id}: {error}"
