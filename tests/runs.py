"""Small training runs for tests: a set of drawn pictures, a run that stops after so many batches, its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marten.distributed import ALONE, World
from marten.settings import Settings
from marten.training import Run
from tests.pictures import draw, encode

QUICK: dict[str, Any] = {
    "conv_net": "cat_dog_conv_net",
    "batch_size": 4,
    "epochs": 2,
    "validation_split": 0.25,
    "num_workers": 0,
    "augment": "standard",
    "dropout": 0.3,
    "ema": 0.5,
    "device": "cpu",
    "precision": "fp32",
}


class StopAfter:
    """An interrupt that asks for a stop once it was asked so many times; never, when None.

    It is asked after each of the 5 training batches of an epoch, and before each of the 2 validation batches.
    """

    def __init__(self, times: int | None) -> None:
        self._left = times
        self._asked = ""

    def ask(self, reason: str) -> None:
        self._asked = reason

    @property
    def reason(self) -> str:
        if self._asked or self._left is None:
            return self._asked
        self._left -= 1
        return "SIGTERM" if self._left <= 0 else ""


def draw_set(folder: Path, count: int = 24) -> Path:
    """Fill a folder with cats and, darker, dogs; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        label = "dog" if number % 2 else "cat"
        darker = draw(number, (60, 50)).point([value // (1 + number % 2) for value in range(256)] * 3)
        (folder / f"{label}.{number}.jpg").write_bytes(encode(darker, "JPEG"))
    return folder


def run_once(data: Path, out: Path, stop_after: int | None = None, world: World = ALONE, **changes: Any) -> int:
    """Begin a run, or go on with it, as train_main.py does; returns the exit code."""
    run = Run(Settings(**{**QUICK, "data_dir": str(data), "model_path": str(out / "model.pth"), **changes}), world)
    try:
        run.resume()
        return run.go_on(StopAfter(stop_after))  # type: ignore[arg-type]
    finally:
        run.batches.close()
        run.held_out.close()


def result(out: Path) -> tuple[bytes, bytes]:
    """What must not depend on any interruption: weights and metrics, as bytes."""
    return (out / "model.pth").read_bytes(), (out / "model.run" / "metrics.jsonl").read_bytes()
