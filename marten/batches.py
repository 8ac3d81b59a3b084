"""From samples to batches of pixels: order a function of (seed, epoch), augmentation of (seed, epoch, index)."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from marten.datasets import Sample
from marten.distributed import ALONE, World
from marten.errors import DataError, PictureError, UsageError
from marten.settings import AUGMENTATIONS
from marten.streams import stream
from modelspec import Preprocess, to_pixels

Batch = tuple[torch.Tensor, torch.Tensor, int]
_Place = tuple[int, int]
_Target = int | float | tuple[float, float]
_Item = tuple[torch.Tensor, _Target] | str


def augmentation(name: str, preprocess: Preprocess) -> Any:
    """A random change of a picture, ending at the size that the network takes. Draws from torch's global generator.

    none      the serving transform, unchanged
    flip      that, mirrored half of the time
    light     a random crop of 50-100 % of the area, mirrored half of the time
    standard  a random crop of 35-100 % of the area, mirrored half of the time, light changes of colour
    strong    a random crop of 20-100 %, mirrored, then one random operation (TrivialAugment)

    Raises:
        UsageError: an unknown name.
    """
    height, width = preprocess.size_px
    mode = InterpolationMode(preprocess.interpolation)
    flip = v2.RandomHorizontalFlip()
    if name == "none":
        return preprocess.resized
    if name == "flip":
        return v2.Compose([v2.Lambda(preprocess.resized), flip])
    if name == "light":
        crop = v2.RandomResizedCrop((height, width), scale=(0.5, 1.0), interpolation=mode)
        return v2.Compose([crop, flip])
    if name == "standard":
        crop = v2.RandomResizedCrop((height, width), scale=(0.35, 1.0), interpolation=mode)
        return v2.Compose([crop, flip, v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)])
    if name == "strong":
        crop = v2.RandomResizedCrop((height, width), scale=(0.2, 1.0), interpolation=mode)
        return v2.Compose([crop, flip, v2.TrivialAugmentWide(interpolation=mode)])
    raise UsageError(f"--augment must be one of {', '.join(AUGMENTATIONS)}, found {name!r}")


class Pictures(Dataset[_Item]):
    """Samples as (uint8 pixels of shape (height, width, 3), target), fetched by (epoch, index).

    A target is a label or a score; where scores weigh differently, (score, weight) for every sample.

    One that cannot be read any more is a line that says why: an exception would lose its kind between processes.
    """

    def __init__(self, samples: Sequence[Sample], preprocess: Preprocess, augment: str = "none", seed: int = 0) -> None:
        self.samples = samples
        self.preprocess = preprocess
        self.seed = seed
        self._weighted = any(sample.weight != 1 for sample in samples)
        self._plain = augment == "none"
        self._augment = augmentation(augment, preprocess)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: _Place) -> _Item:
        epoch, index = place
        sample = self.samples[index]
        known = sample.label if sample.score is None else sample.score
        target: _Target = (known, sample.weight) if self._weighted else known
        try:
            picture = self.preprocess.read(sample.source())
        except PictureError as error:
            return f"{sample.path} could be read before training began, now it cannot: {error}"
        if self._plain:
            return to_pixels(self._augment(picture)), target
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(self.seed, "augment", epoch, index))
            return to_pixels(self._augment(picture)), target


class Batches:
    """Batches of one data set, epoch after epoch, from any batch on.

    Args:
        pictures: what to draw from.
        batch_size: pictures per batch, of all processes together; the last one of an epoch may be smaller.
        shuffle: a new order each epoch, from the pictures' seed; else the order of the samples.
        workers: loader processes; 0 decodes in this one.
        pin: whether to put batches into memory that a GPU reads quickly.
        world: the processes that share each batch.
    """

    def __init__(
        self,
        pictures: Pictures,
        batch_size: int,
        *,
        shuffle: bool,
        workers: int,
        pin: bool = False,
        world: World = ALONE,
    ) -> None:
        self.pictures = pictures
        self.batch_size = batch_size
        self.shuffle = shuffle
        self._world = world
        self._epoch = 0
        self._start = 0
        self._loader = DataLoader(
            pictures,
            batch_sampler=self,
            num_workers=workers,
            collate_fn=_stack,
            pin_memory=pin,
            persistent_workers=workers > 0,
            worker_init_fn=_quiet_worker,
        )
        # also at the end of a program that forgot to close: it would wait for workers that heed no signal
        self._end = weakref.finalize(self, _end_workers, self._loader)

    def __len__(self) -> int:
        """Batches in one whole epoch."""
        return -(-len(self.pictures) // self.batch_size)

    def __iter__(self) -> Iterator[list[_Place]]:
        order = self._order()
        for batch in range(self._start, len(self)):
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self._epoch, i) for i in self._world.share(whole)]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of one epoch from batch `start` on, this process's share of each: pixels, targets, count.

        Pixels are uint8 (share, height, width, 3); the count is that of the whole batch.

        Targets are int64 labels or float scores of shape (batch,), or weighted scores of shape (batch, 2).

        Raises:
            DataError: a picture that cannot be read any more; when its batch is asked for.
        """
        self._epoch, self._start = epoch, start
        return self._readable(iter(self._loader), start)

    def close(self) -> None:
        """End the loader processes; they leave signals to this one, so nothing else would."""
        self._end()

    def _readable(self, batches: Iterator[Any], start: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches, start):
            if isinstance(batch, str):
                raise DataError(batch)
            yield *batch, min(self.batch_size, len(self.pictures) - number * self.batch_size)

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.pictures)))
        generator = torch.Generator().manual_seed(stream(self.pictures.seed, "order", self._epoch))
        return torch.randperm(len(self.pictures), generator=generator).tolist()


def _end_workers(loader: DataLoader[Any]) -> None:
    # not left to garbage collection: the traceback of an error may hold the iterator to the end of the program
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]  # of the kind with workers


def _stack(items: list[_Item]) -> tuple[torch.Tensor, torch.Tensor] | str:
    good = [item for item in items if not isinstance(item, str)]
    if len(good) < len(items):
        return next(item for item in items if isinstance(item, str))
    return torch.stack([pixels for pixels, _ in good]), torch.tensor([label for _, label in good])


def _quiet_worker(worker: int) -> None:
    """One thread each, and signals left to the main process: it decides when to stop and saves the state."""
    import signal

    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
