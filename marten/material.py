"""What a run learns from: its pictures, looked at and split, and the specification of the model that they make."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from marten.architectures import Architecture, find_preprocess
from marten.datasets import PictureSet, Sample, split, split_table
from marten.distributed import World, moved
from marten.errors import UsageError
from marten.runlog import look_at
from marten.scoretable import LAYOUT, Scale, fit_scale, standard_of
from marten.settings import Settings
from modelspec import ModelSpec, Preprocess


@dataclass(frozen=True)
class Material:
    """Pictures and what follows from them and the settings alone.

    Attributes:
        pictures: all usable ones.
        training, validation: their two parts; of scores, on the scale of the answers.
        scale: from the table's scores to the answers; None where they are the same, and for classes.
        spec: what will serve.
    """

    pictures: PictureSet
    training: list[Sample]
    validation: list[Sample]
    scale: Scale | None
    spec: ModelSpec

    @property
    def split_table(self) -> str:
        """The split as CSV text."""
        return split_table(self.pictures.labels, self.training, self.validation)

    @property
    def split_digest(self) -> str:
        """Hex sha256 of the split."""
        return hashlib.sha256(self.split_table.encode()).hexdigest()

    @property
    def alone(self) -> list[str]:
        """Classes that have one picture only, which is trained on and never validated with."""
        return [name for name, count in self.pictures.counts(self.validation).items() if not count]

    def told(self) -> Mapping[str, Any]:
        """What the card says of it."""
        return {
            "name": self.pictures.name,
            "layout": self.pictures.layout,
            "digest": self.pictures.digest,
            "train": self.pictures.counts(self.training),
            "validation": self.pictures.counts(self.validation),
            "rejected": len(self.pictures.rejected),
            **({"scale": asdict(self.scale)} if self.scale else {}),
        }


def find_material(settings: Settings, architecture: Architecture, world: World) -> Material:
    """Look at the pictures, split them, and say what model they make.

    The first process alone looks; the others find the same files below their own --data_dir.

    Raises:
        MartenError: nothing that can be trained on, or settings that do not fit what is there.
    """
    root = Path(settings.data_dir)
    preprocess = find_preprocess(settings.pre, architecture)
    looked, there = world.first(lambda: (look_at(root, preprocess, settings.on_bad), root))
    pictures = moved(looked, there, root)
    training, validation = split(pictures.samples, settings.validation_split, settings.seed)
    scale = fit_scale(training, settings.score_range) if pictures.layout == LAYOUT else None
    if scale:
        training, validation = scale.apply(training), scale.apply(validation)
    return Material(
        pictures, training, validation, scale, _spec(settings, architecture, preprocess, pictures, training)
    )


def _spec(
    settings: Settings,
    architecture: Architecture,
    preprocess: Preprocess,
    pictures: PictureSet,
    training: Sequence[Sample],
) -> ModelSpec:
    is_score = pictures.layout == LAYOUT
    if not is_score and (settings.loss != "auto" or settings.score_range or settings.weigh):
        raise UsageError(
            f"--loss, --score_range and --weigh are for a table of scores, and {pictures.root} holds classes"
        )
    offset, scale = standard_of(training) if is_score else (0.0, 1.0)
    outputs = 1 if is_score else len(pictures.labels)
    arch_args = {**architecture.arch_args, "num_classes": outputs, "dropout": settings.dropout}
    return ModelSpec(
        name=settings.conv_net,
        arch=architecture.arch,
        task="regression" if is_score else "classification",
        labels=() if is_score else pictures.labels,
        score_offset=offset,
        score_scale=scale,
        arch_args=arch_args,
        preprocess=preprocess,
        mirror=settings.mirror,
    )
