"""The settings of one training run, before torch is imported: what the flags of train_main.py say."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from marten.architectures import find_architecture
from marten.errors import UsageError
from marten.files import MODELS
from marten.schedules import SCHEDULES

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
AUGMENTATIONS = ("none", "flip", "light", "standard", "strong")
LOSSES = ("auto", "mse", "huber")
MIXES = ("none", "mixup", "cutmix", "both")
WEIGHINGS = ("votes", "tenths")
BATCH_NORMS = ("shared", "own")
TRACKERS = ("tensorboard", "wandb", "mlflow")
_WITHOUT_EFFECT_ON_RESULT = (
    "model_path",
    "data_dir",
    "num_workers",
    "checkpoint_every",
    "max_runtime",
    "self_checkpoint",
    "track",
)


@dataclass(frozen=True)
class Settings:
    """Every choice that shapes a run; see `train_main.py --help` for their words.

    Attributes:
        lr: learning rate of the head, and optionally of the backbone.
        freeze: "none", "backbone", or the number of first epochs in which only the head learns.
        weights: "auto", "none", "imagenet", or the path of a state dict to start from.
        pre: whose preprocessing: "own" of the network, or another network's name; see marten.architectures.
        mix: how two pictures of a batch become one; see marten.mixing.
        weigh: what makes one score's error count more than another's; see marten.weighing.
        mirror: answers are the mean over a picture and its mirror image, in validation as in serving.
        batch_norm: of several processes, over the pictures of all ("shared") or of each ("own").
        track: who is told of each epoch besides metrics.jsonl; see marten.tracking.
        checkpoint_every: epochs as "2", minutes as "30min", or "" for never.
    """

    conv_net: str = "base_cnn"
    data_dir: str = "data"
    model_path: str = ""
    dropout: float = 0.2
    batch_size: int = 32
    validation_split: float = 0.1
    lr: tuple[float, ...] = (1e-3,)
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: int = 10
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    batch_norm: str = "shared"
    num_workers: int = -1
    weights: str = "auto"
    pre: str = "own"
    freeze: str = "none"
    augment: str = "standard"
    mix: str = "none"
    schedule: str = "cosine"
    loss: str = "auto"
    score_range: tuple[float, ...] = ()
    weigh: tuple[str, ...] = ()
    label_smoothing: float = 0.0
    ema: float = 0.0
    mirror: bool = False
    early_stop: int = 0
    on_bad: str = "skip"
    checkpoint_every: str = ""
    max_runtime: str = ""
    self_checkpoint: bool = False
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = {
            f"--dropout must lie in [0, 1), found {self.dropout}": 0 <= self.dropout < 1,
            f"--batch_size must be at least 1, found {self.batch_size}": self.batch_size >= 1,
            f"--validation_split must lie in [0, 1), found {self.validation_split}": 0 <= self.validation_split < 1,
            f"--lr takes one or two positive numbers, found {self.lr}": len(self.lr) in (1, 2) and min(self.lr) > 0,
            f"--weight_decay must not be negative, found {self.weight_decay}": self.weight_decay >= 0,
            f"--betas takes two numbers in [0, 1), found {self.betas}": all(0 <= b < 1 for b in self.betas),
            f"--epochs must be at least 1, found {self.epochs}": self.epochs >= 1,
            f"--label_smoothing must lie in [0, 1), found {self.label_smoothing}": 0 <= self.label_smoothing < 1,
            f"--ema must lie in [0, 1), found {self.ema}": 0 <= self.ema < 1,
            f"--early_stop must not be negative, found {self.early_stop}": self.early_stop >= 0,
            f"--num_workers must be -1 (fitted to the machine) or more, found {self.num_workers}": self.num_workers
            >= -1,
            f"--freeze must be none, backbone or a number of epochs, found {self.freeze!r}": (
                self.freeze in ("none", "backbone") or self.freeze.isdecimal()
            ),
            f"--score_range takes two rising numbers, found {self.score_range}": (
                not self.score_range or (len(self.score_range) == 2 and self.score_range[0] < self.score_range[1])
            ),
            f"--weigh takes {' and '.join(WEIGHINGS)}, found {' '.join(self.weigh)}": set(self.weigh) <= set(WEIGHINGS),
            f"--track takes {', '.join(TRACKERS)}, found {' '.join(self.track)}": set(self.track) <= set(TRACKERS),
            f"--schedule finetune needs --freeze N, fewer than --epochs, found {self.freeze}": (
                self.schedule != "finetune" or (self.freeze.isdecimal() and 0 < int(self.freeze) < self.epochs)
            ),
            "--self_checkpoint needs --checkpoint_every": bool(self.checkpoint_every) or not self.self_checkpoint,
            f"--checkpoint_every must be at least 1 epoch, found {self.checkpoint_every}": (
                not self.checkpoint_every.isdecimal() or int(self.checkpoint_every) > 0
            ),
            f"--model_path names a file that ends in .pth, found {self.model_path}": (
                not self.model_path or Path(self.model_path).suffix == ".pth"
            ),
        }
        for name, known in (
            ("device", DEVICES),
            ("precision", PRECISIONS),
            ("augment", AUGMENTATIONS),
            ("mix", MIXES),
            ("batch_norm", BATCH_NORMS),
            ("schedule", SCHEDULES),
            ("on_bad", ("skip", "refuse")),
            ("loss", LOSSES),
        ):
            found = getattr(self, name)
            checks[f"--{name} must be one of {', '.join(known)}, found {found!r}"] = found in known
        broken = [message for message, good in checks.items() if not good]
        if broken:
            raise UsageError("; ".join(broken))
        find_architecture(self.conv_net)
        self.checkpoint_interval  # noqa: B018  validates the text
        self.max_runtime_s  # noqa: B018

    @property
    def weights_path(self) -> Path:
        """Where the state dict goes: --model_path, or models/model_<conv_net>.pth."""
        return Path(self.model_path) if self.model_path else MODELS / f"model_{self.conv_net}.pth"

    @property
    def run_folder(self) -> Path:
        """Folder beside the weights that holds the run's metrics, curves, split and checkpoint."""
        return self.weights_path.with_suffix(".run")

    @property
    def checkpoint_interval(self) -> tuple[int, float]:
        """(epochs, seconds) between checkpoints; 0 where that clock is not asked for."""
        if self.checkpoint_every.isdecimal():
            return int(self.checkpoint_every), 0.0
        return 0, duration_s(self.checkpoint_every, "--checkpoint_every") if self.checkpoint_every else 0.0

    @property
    def max_runtime_s(self) -> float:
        """Seconds after which the run checkpoints and exits 85; 0 for no limit."""
        return duration_s(self.max_runtime, "--max_runtime") if self.max_runtime else 0.0

    def shaping(self) -> dict[str, Any]:
        """The settings on which the result depends, as plain data; a resumed run must repeat them."""
        chosen = asdict(self)
        if self.weights not in ("auto", "none", "imagenet"):
            # the name is enough: a card travels, and a run that goes on in another sandbox finds the file elsewhere
            chosen["weights"] = Path(self.weights).name
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in chosen.items()
            if name not in _WITHOUT_EFFECT_ON_RESULT
        }


def duration_s(text: str, flag: str) -> float:
    """Seconds of "90s", "30min", "4h" or "1h30min".

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)min)?(?:(\d+(?:\.\d+)?)s)?", text)
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if not seconds:
        raise UsageError(f"{flag} takes a time such as 90s, 30min or 1h30min, found {text!r}")
    return seconds


def settings_from(namespace: Any) -> Settings:
    """Take from parsed flags those that are settings; lists become tuples.

    Raises:
        UsageError: a value out of range.
    """
    names = [field.name for field in fields(Settings) if hasattr(namespace, field.name)]
    values: dict[str, Any] = {name: getattr(namespace, name) for name in names}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Settings(**values)
