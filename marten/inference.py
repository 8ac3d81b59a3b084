"""Asking a network about many pictures: streaming, sharded, resumable; one bad file never ends a run.

Rows are written as they come into `<output>.partial`, with what they depend on in `<output>.partial.json`; the finished
table is put in place in one step. Memory holds a few batches, however many pictures there are.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import queue
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from engines import Engine, choose_engine
from marten.errors import DataError, MartenError, PictureError, UsageError
from marten.files import replacing, write_text
from marten.fitting import available_cores, available_memory, fit_threads, fit_workers
from marten.pictures import Sources, natural, opened
from modelspec import ModelSpec

Row = tuple[str, "list[float] | str"]
_WORTH_AN_ENGINE = 100
"""Pictures per lane from which the second or two pay off that building its engine takes."""
_SYNC_S = 1.0
"""At most so much work is done anew after a power cut: to sync each batch takes a small network's time."""
_AHEAD = 3
"""Batches under way for each thread, so that none is idle while the table is synced."""


def header(spec: ModelSpec, format_: str, label: str) -> list[str]:
    """The columns of a table.

    Raises:
        UsageError: a model that is no classifier, an unknown label, or none chosen among more than two.
    """
    if spec.task != "classification":
        raise UsageError(f"{spec.name} answers with a {spec.task}, not with probabilities: use predict_main.py --json")
    if format_ == "all":
        return ["fileid", *spec.labels]
    positive(spec, label)
    return ["id", "label"] if format_ == "kaggle" else ["fileid", "prob"]


def positive(spec: ModelSpec, label: str) -> int:
    """Index of the label whose probability is told; the second of two when none is named."""
    if label and label not in spec.labels:
        raise UsageError(f"--label must be one of {', '.join(spec.labels)}, found {label!r}")
    if not label and len(spec.labels) != 2:
        raise UsageError(f"{spec.name} knows {len(spec.labels)} classes: name one with --label, or use --format all")
    return spec.labels.index(label) if label else 1


def build_lanes(
    network: torch.nn.Module, spec: ModelSpec, device: torch.device, precision: str, pictures: int
) -> tuple[list[Engine], str]:
    """Make ready what answers side by side: on a CPU a copy of the network for each core, on a GPU one.

    Sets torch's threads for this process, so that all lanes together fill the cores.

    Args:
        network: in eval mode, on `device`.
        spec: of the network.
        device: where it runs.
        precision: "fp32", or "auto" for the fastest that agrees; see `engines.choose_engine`.
        pictures: how many will be asked about; for a few, no engine is built and the network itself answers.

    Returns:
        The lanes, and one line that tells what they are.
    """
    if device.type != "cpu":
        engine, told = choose_engine(network, spec, {"precision": precision, "engine": "auto"}, device, 1)
        return [engine], told
    cores = available_cores()
    lanes = fit_workers(1, cores, available_memory())
    threads = fit_threads(lanes, cores)
    torch.set_num_threads(threads)
    if pictures < _WORTH_AN_ENGINE * lanes:
        return [network] * lanes, f"engine eager fp32, {threads} threads, {lanes} lanes"
    settings = {"precision": precision, "engine": "auto"}
    built = [choose_engine(network, spec, settings, device, threads) for _ in range(lanes)]
    return [engine for engine, _ in built], f"{built[0][1]}, {lanes} lanes"


def ask(
    lanes: Sequence[Engine],
    spec: ModelSpec,
    sources: Sources,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
) -> Iterator[list[Row]]:
    """Probabilities of all classes for each picture, in order, batch by batch; the reason in place of them if bad.

    A thread takes a batch all the way from its files to its answers, so that nothing waits for anything but its turn
    at a lane. Each thread holds the pixels of one batch; a few batches' answers wait to be taken.

    Args:
        lanes: from `build_lanes`; a network in eval mode on `device` is one as well.
        spec: of the network.
        sources: any number.
        device: where the lanes are.
        batch_size: pictures per forward pass.
    """
    preprocess = spec.preprocess
    threads = len(lanes) if torch.device(device).type == "cpu" else max(2, available_cores())
    free: queue.SimpleQueue[Engine] = queue.SimpleQueue()
    for lane in lanes:
        free.put(lane)
    with opened() as read, ThreadPoolExecutor(threads) as pool:

        def look(member: tuple[Path, str]) -> torch.Tensor | str:
            try:
                return preprocess.pixels(preprocess.read(read(member)))
            except (OSError, KeyError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
                return getattr(error, "strerror", None) or str(error) or type(error).__name__
            except PictureError as error:
                return str(error)

        def answer(start: int) -> list[Row]:
            seen = [look(member) for member in sources.members[start : start + batch_size]]
            good = [pixels for pixels in seen if isinstance(pixels, torch.Tensor)]
            lane = free.get()
            try:
                answers = iter(_probabilities(lane, spec, good, device))
            finally:
                free.put(lane)
            ids = sources.ids[start : start + batch_size]
            return [(i, s if isinstance(s, str) else next(answers)) for i, s in zip(ids, seen, strict=True)]

        starts = iter(range(0, len(sources.ids), batch_size))
        under_way = deque(pool.submit(answer, start) for start in itertools.islice(starts, _AHEAD * threads))
        try:
            while under_way:
                rows = under_way.popleft().result()
                under_way.extend(pool.submit(answer, start) for start in itertools.islice(starts, 1))
                yield rows
        finally:
            pool.shutdown(cancel_futures=True)


@torch.inference_mode()
def _probabilities(
    lane: Engine, spec: ModelSpec, pixels: list[torch.Tensor], device: torch.device | str
) -> list[list[float]]:
    if not pixels:
        return []
    images_NCHW = spec.preprocess.normalize(torch.stack(pixels).to(device))
    rows: list[list[float]] = spec.probabilities(spec.logits(lane, images_NCHW)).cpu().tolist()
    return rows


class Table:
    """A growing .csv that can be left at any moment and taken up again.

    Args:
        output: the finished table.
        columns: its header.
        depends_on: plain data; a partial table that depends on something else is refused.

    Raises:
        UsageError: a partial table of another model, other pictures or another format lies there.
        MartenError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, output: Path, columns: Sequence[str], depends_on: dict[str, Any]) -> None:
        self.output = output
        self._partial = output.with_name(output.name + ".partial")
        self._told = output.with_name(output.name + ".partial.json")
        self._bad = output.with_name(output.stem + ".bad.csv")
        self._columns = list(columns)
        with self._room():
            output.parent.mkdir(parents=True, exist_ok=True)
        told = {"columns": self._columns, **depends_on}
        self.done = 0
        self.rejected = 0
        self._synced = time.monotonic()
        if self._told.exists() and self._partial.exists():
            then = json.loads(self._told.read_text(encoding="utf-8"))
            changed = [name for name in told if then.get(name) != told[name]]
            if changed:
                raise UsageError(
                    f"{self._partial} is of another run: {', '.join(changed)} differ. Remove it to start anew, or give"
                    " another --output"
                )
            self._take_up()
        else:
            with self._room():
                self._partial.write_bytes(b"")
            write_text(self._told, json.dumps(told) + "\n")

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MartenError(
                f"cannot write {self._partial}: {error.strerror or error}. What is answered is kept, and the same"
                " command goes on where it can be written again"
            ) from error

    def _take_up(self) -> None:
        """Count the whole rows, and cut off one that was not finished."""
        with open(self._partial, "r+b") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                self.done += 1
                self.rejected += line.startswith(b"!")
            file.truncate(end)

    def add(self, rows: Sequence[Row], values: Callable[[list[float]], list[float]]) -> None:
        """Append a batch, which survives a kill; and a power cut, once a second has gone by."""
        with self._room(), open(self._partial, "a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for id_, found in rows:
                if isinstance(found, str):
                    self.rejected += 1
                    writer.writerow(["!" + id_, " ".join(found.split())])
                else:
                    writer.writerow(["=" + id_, *(f"{p:.6f}" for p in values(found))])
            file.flush()
            if time.monotonic() - self._synced > _SYNC_S:
                os.fsync(file.fileno())
                self._synced = time.monotonic()
        self.done += len(rows)

    def finish(self, filled: float | None = None) -> None:
        """Put the table in place, and `<stem>.bad.csv` beside it where pictures could not be read.

        Args:
            filled: value for pictures without an answer, where every picture must have a row; None leaves them out.
        """
        with (
            open(self._partial, encoding="utf-8", newline="") as file,
            replacing(self.output) as good,
            replacing(self._bad) as bad,
            open(good, "w", encoding="utf-8", newline="") as good_file,
            open(bad, "w", encoding="utf-8", newline="") as bad_file,
        ):
            table = csv.writer(good_file, lineterminator="\n")
            listed = csv.writer(bad_file, lineterminator="\n")
            table.writerow(self._columns)
            listed.writerow([self._columns[0], "reason"])
            for mark, *row in csv.reader(file):
                if mark[0] == "=":
                    table.writerow([mark[1:], *row])
                else:
                    listed.writerow([mark[1:], *row])
                    if filled is not None:
                        table.writerow([mark[1:], *[f"{filled:.6f}"] * (len(self._columns) - 1)])
        if not self.rejected:
            self._bad.unlink()
        self._partial.unlink()
        self._told.unlink()


def merge(parts: Sequence[Path], output: Path) -> int:
    """Put the tables of all shards together, in the order that one run would have given; returns the rows.

    Raises:
        DataError: a part is missing, of another format, or holds a picture that another part holds too.
    """
    tables = []
    for part in parts:
        try:
            with open(part, encoding="utf-8", newline="") as file:
                tables.append(list(csv.reader(file)))
        except OSError as error:
            raise DataError(f"cannot read {part}: {error.strerror}") from error
    if not tables or not tables[0] or any(not table or table[0] != tables[0][0] for table in tables):
        raise DataError(f"the parts have other columns: {', '.join(map(str, parts))}")

    rows = sorted((row for table in tables for row in table[1:]), key=lambda row: natural(row[0]))
    twice = [a[0] for a, b in itertools.pairwise(rows) if a[0] == b[0]]
    if twice:
        raise DataError(f"{twice[0]} and {len(twice) - 1} more are in two parts: a shard was given twice")
    with replacing(output) as neighbour, open(neighbour, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([tables[0][0], *rows])
    return len(rows)
