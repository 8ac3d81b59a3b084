"""Crops of a folder as batches for training: balanced over classes, in an order that seed and epoch alone decide."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from marten.cells.config import Config
from marten.cells.crops import from_strips
from marten.cells.errors import CellsError
from marten.cells.index import plain
from marten.cells.store import TABLE, CropReader, Strip
from marten.streams import stream

_AHEAD = 3
HELD_OUT = 10
"""One site in so many is held out when the table has no validation crops."""


class CropSet:
    """The crops of a table, split for training and validation.

    Attributes:
        reader: of the crops.
        labels: class names, sorted.
        targets: class of each row.
        training, validation: numbers of rows.
        told: how the split was made.
    """

    def __init__(self, config: Config, folder: Path, table: str = TABLE) -> None:
        self.reader = CropReader(folder, table)
        self.config = config
        rows = self.reader.rows
        target, split = config.target, config["train.partition.split_field"]
        missing = [name for name in (target, split) if rows and name not in rows[0]]
        if missing or not rows:
            raise CellsError(
                f"{folder / table} lacks the column {missing[0]!r}" if missing else f"{folder / table} is empty"
            )
        self.labels = tuple(sorted({row[target] for row in rows}))
        if len(self.labels) < 2:
            raise CellsError(f"{folder / table} holds one class only, {self.labels[0]!r}: sample more treatments")
        number = {label: index for index, label in enumerate(self.labels)}
        self.targets = np.array([number[row[target]] for row in rows])
        learn = {plain(v) for v in config["train.partition.training"]}
        judge = {plain(v) for v in config["train.partition.validation"]}
        splits = [plain(row[split]) for row in rows]
        self.training = np.flatnonzero([value in learn for value in splits])
        self.validation = np.flatnonzero([value in judge for value in splits])
        self.told = f"validation: {split} in {sorted(judge)}"
        if len(self.training) and not len(self.validation):
            self._hold_out()
        if not len(self.training):
            raise CellsError(f"no crop of {folder / table} has {split} in {sorted(learn)} (train.partition.training)")
        lacking = set(range(len(self.labels))) - set(self.targets[self.training].tolist())
        if lacking:
            raise CellsError(f"no training crop of {self.labels[min(lacking)]!r} in {folder / table}")

    def _hold_out(self) -> None:
        """Hold out whole sites: cells of one picture must not stand on both sides."""
        keys = [self.reader.rows[number]["Key"] for number in self.training]
        order = sorted(set(keys), key=lambda key: stream(0, "held out", key))
        chosen = set(order[: max(1, len(order) // HELD_OUT)]) if len(order) > 1 else set()
        held = np.array([key in chosen for key in keys])
        self.validation, self.training = self.training[held], self.training[~held]
        self.told = f"validation: {len(chosen)} of {len(order)} training sites, for the table has no validation crops"

    def epoch_order(self, seed: int, epoch: int) -> NDArray[np.intp]:
        """Rows of one epoch: the median class's number of crops from every class, a smaller one's several times."""
        targets = self.targets[self.training]
        members = [self.training[targets == number] for number in range(len(self.labels))]
        per_class = int(np.median([len(rows) for rows in members]))
        rng = np.random.default_rng(stream(seed, "epoch", epoch))
        drawn = []
        for rows in members:
            again = [rows] * (per_class // len(rows))
            drawn.append(np.concatenate([*again, rng.permutation(rows)[: per_class % len(rows)]]))
        return np.asarray(rng.permutation(np.concatenate(drawn)))

    @property
    def per_epoch(self) -> int:
        """Crops in one balanced epoch."""
        return len(self.epoch_order(0, 0))


class CropBatches:
    """Reads batches of crops ahead of the network, in threads: decoding lets other threads run.

    Args:
        crops: what to read from.
        workers: threads.
        keep: how many decoded crops stay in memory for the next epoch.
    """

    def __init__(self, crops: CropSet, workers: int, keep: int) -> None:
        self.crops = crops
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._keep = keep
        self._kept: dict[int, Strip] = {}
        self._channels = len(crops.config.channels)
        self._masked = bool(crops.config["dataset.locations.mask_objects"])

    def read(self, order: Sequence[int] | NDArray[np.intp], batch_size: int, start: int = 0) -> Iterator[torch.Tensor]:
        """Batches of float32 (batch, channels, box, box) of values 0..1, from batch `start` on.

        Raises:
            CellsError: a crop is missing or damaged, with its name.
        """
        batches = [order[i : i + batch_size] for i in range(start * batch_size, len(order), batch_size)]
        flying: deque[list[Future[Strip]]] = deque()
        for number, rows in enumerate(batches):
            while len(flying) < _AHEAD and number + len(flying) < len(batches):
                flying.append([self._pool.submit(self._read, int(row)) for row in batches[number + len(flying)]])
            strips = [future.result() for future in flying.popleft()]
            shapes = {strip.shape for strip in strips}
            if len(shapes) > 1:
                raise CellsError(f"crops of different shapes {sorted(shapes)}: run scripts/cells check --prune")
            assert len(rows) == len(strips)
            yield torch.from_numpy(from_strips(np.stack(strips), self._channels, self._masked))

    def _read(self, row: int) -> Strip:
        strip = self._kept.get(row)
        if strip is None:
            strip = self.crops.reader.read(row)
            if len(self._kept) < self._keep:
                self._kept[row] = strip
        return strip
