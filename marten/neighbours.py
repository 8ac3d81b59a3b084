"""Pictures that are nearly the same: copies scaled, recompressed or lightly changed, found by what they look like.

A copy on both sides of a split makes the accuracy too good; a copy under two labels makes it too bad.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from marten.datasets import Sample
from marten.files import available_cpus
from modelspec import read_picture

_SIDE = 16
_CLOSE = 28
"""Of 240 bits. Measured on 200 photographs of cats and dogs: halved and recompressed at quality 40 they differ in 6
(median) to 22 bits from themselves, and in 68 or more from each other (20,100 pairs)."""
_FLAT = 1.5
"""Grey levels of mean difference between neighbours below which a picture is too empty to be told by its looks."""

Hash = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Pair:
    """Two pictures that look alike.

    Attributes:
        first, second: the samples.
        bits: in how many of 240 comparisons of neighbouring places they differ; 0 is the most alike.
    """

    first: Sample
    second: Sample
    bits: int


def find_pairs(
    samples: Sequence[Sample], close: int = _CLOSE, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Pair]:
    """Every pair of samples that look alike, the most alike first.

    Args:
        samples: readable ones.
        close: bits that may differ, 0 to 240.
        progress: called with (done, total) while pictures are read.

    Cost: each picture is decoded once, small; then n²/2 comparisons of 30 bytes, half a minute for 25,000 pictures
    on one core.
    """
    hashes, used = [], []
    with ThreadPoolExecutor(available_cpus()) as pool:
        for done, (sample, found) in enumerate(zip(samples, pool.map(_look, samples), strict=True), 1):
            if found is not None:
                hashes.append(found)
                used.append(sample)
            progress(done, len(samples))
    return sorted(
        (Pair(used[i], used[j], bits) for i, j, bits in _close_pairs(hashes, close)),
        key=lambda pair: (pair.bits, pair.first.id, pair.second.id),
    )


def difference_hash(picture: Image.Image) -> Hash | None:
    """240 bits, packed into 30 bytes: whether each place of a 15x16 grid is darker than its right neighbour.

    None for a picture that is nearly one colour, which looks like every other such.

    Source: N. Krawetz, Kind of Like That, 2013 (dHash).
    """
    grey = np.asarray(picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    steps = np.diff(grey, axis=1)
    return None if np.abs(steps).mean() < _FLAT else np.packbits(steps > 0)


def pairs_table(pairs: Sequence[Pair], labels: Sequence[str], parts: dict[str, str]) -> str:
    """Pairs as CSV text: both paths, labels and parts of the split, the bits, and what is wrong with it.

    `problem` is "across" where one is trained on and the other validates, "labels" where they bear two, or both.
    """
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(("first", "second", "bits", "first_label", "second_label", "first_part", "second_part", "problem"))
    for pair in pairs:
        names = [labels[s.label] for s in (pair.first, pair.second)]
        where = [parts.get(s.id, "") for s in (pair.first, pair.second)]
        wrong = [name for name, two in (("across", where), ("labels", names)) if all(two) and two[0] != two[1]]
        writer.writerow((pair.first.id, pair.second.id, pair.bits, *names, *where, " ".join(wrong)))
    return rows.getvalue()


def _look(sample: Sample) -> Hash | None:
    return difference_hash(read_picture(sample.source(), 4 * _SIDE))


def _close_pairs(hashes: Sequence[Hash], close: int) -> Iterator[tuple[int, int, int]]:
    if len(hashes) < 2:
        return
    table = np.stack(hashes)
    for i in range(len(table) - 1):
        bits = np.bitwise_count(table[i + 1 :] ^ table[i]).sum(1)
        for j in np.flatnonzero(bits <= close):
            yield i, int(i + 1 + j), int(bits[j])
