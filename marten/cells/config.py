"""The experiment's configuration: DeepProfiler's JSON file, every key of it known, checked and told.

DeepProfiler has no defaults: a missing key is a KeyError far from its cause, an unknown one is silently ignored.
Here `KEYS` says of each key what it may hold, what stands in for it when it is absent, and what becomes of it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marten.cells.errors import ConfigError

REQUIRED = object()
"""Stands for a default that nobody can guess."""

NETWORKS = ("efficientnet", "resnet", "cnn")
LOCATION_MODES = ("single_cells", "full_image")
CROP_GENERATORS = (
    "sampled_crop_generator",
    "crop_generator",
    "online_labels_cropgen",
    "repeat_channel_crop_generator",
    "full_image_crop_generator",
)


@dataclass(frozen=True)
class Key:
    """What one key of the configuration may hold.

    Attributes:
        kind: "text", "int", "number", "bool", "texts", "values" (a list of text or numbers), "any".
        default: used when the key is absent; REQUIRED when there is none.
        told: what it says, one line.
        choices: the only values allowed.
        least: the smallest number allowed.
        idle: why it is read and then changes nothing; empty when it is honoured.
    """

    kind: str
    default: Any
    told: str
    choices: tuple[Any, ...] = ()
    least: float | None = None
    idle: str = ""


_PARAMS = "train.model.params."
KEYS: dict[str, Key] = {
    "dataset.metadata.label_field": Key("text", None, "column of treatments; the first of train.partition.targets"),
    "dataset.metadata.control_value": Key("any", None, "value of that column in the control wells"),
    "dataset.images.channels": Key("texts", REQUIRED, "columns of index.csv with image paths, in network order"),
    "dataset.images.file_format": Key("text", "tif", "extension of the raw images, without the dot"),
    "dataset.images.bits": Key("int", 16, "bits per raw pixel", least=1),
    "dataset.images.width": Key("int", None, "pixels; an image of another width is refused", least=1),
    "dataset.images.height": Key("int", None, "pixels; an image of another height is refused", least=1),
    "dataset.locations.mode": Key("text", "single_cells", "where crops are taken", LOCATION_MODES),
    "dataset.locations.box_size": Key("int", 128, "side of a crop in pixels", least=2),
    "dataset.locations.view_size": Key("int", None, "side in the image of a full_image crop; box_size", least=2),
    "dataset.locations.area_coverage": Key("number", 0.75, "", idle="DeepProfiler does not use it either"),
    "dataset.locations.mask_objects": Key("bool", False, "black out everything but the cell; needs outlines"),
    "prepare.illumination_correction.down_scale_factor": Key("number", 4, "of the mean image", least=1),
    "prepare.illumination_correction.median_filter_size": Key("number", 24, "pixels of the reduced image", least=1),
    "prepare.compression.implement": Key("bool", True, "crops come from outputs/compressed instead of inputs/images"),
    "prepare.compression.scaling_factor": Key("number", 1.0, "size of the compressed images over the raw ones"),
    "prepare.outlines": Key("text", "", "any text switches outlines.csv on"),
    "train.partition.targets": Key("texts", None, "the column to predict; only the first is used"),
    "train.partition.split_field": Key("text", "Split", "column that says which site is for what"),
    "train.partition.training": Key("values", [0], "its values for training"),
    "train.partition.validation": Key("values", [1], "its values for validation"),
    "train.model.name": Key("text", "efficientnet", "the network", NETWORKS),
    "train.model.crop_generator": Key(
        "text", "sampled_crop_generator", "where training crops come from", CROP_GENERATORS
    ),
    "train.model.augmentations": Key("bool", True, "crop, flip, turn, brightness and contrast while training"),
    "train.model.metrics": Key("texts", ["accuracy", "top_k"], "", idle="all of them are always reported"),
    "train.model.epochs": Key("int", 30, "passes over the balanced training crops", least=1),
    "train.model.initialization": Key("text", "ImageNet", "first weights", ("ImageNet", "Random")),
    "train.model.checkpoint_policy": Key("any", 1, "", idle="the newest and the best state are always kept"),
    "train.model.lr_schedule": Key("any", None, 'absent: constant; "cosine", "plateau", or {"epoch": [], "lr": []}'),
    _PARAMS + "learning_rate": Key("number", 0.005, "at the start", least=0),
    _PARAMS + "batch_size": Key("int", 32, "crops", least=1),
    _PARAMS + "conv_blocks": Key("int", 0, "efficientnet 0-7, resnet 18-152, cnn blocks", least=0),
    _PARAMS + "label_smoothing": Key("number", 0.0, "share given to the other classes", least=0),
    _PARAMS + "online_label_smoothing": Key("number", 0.1, "first smoothing of online labels", least=0),
    _PARAMS + "online_lambda": Key("number", 0.01, "share of each epoch's predictions in the labels", least=0),
    _PARAMS + "feature_dim": Key("int", 256, "width of the cnn's feature layer", least=1),
    _PARAMS + "latent_dim": Key("int", 100, "", idle="belongs to the autoencoder"),
    _PARAMS + "epsilon_std": Key("number", 1.0, "", idle="belongs to the autoencoder"),
    _PARAMS + "pooling": Key("text", "avg", "", idle="average pooling is the only kind"),
    "train.sampling.factor": Key("number", 1.0, "share of the median number of cells taken from each site", least=0),
    "train.sampling.workers": Key("int", 2, "processes that read crops", least=0),
    "train.sampling.cache_size": Key("int", 15000, "crops that stay in memory between epochs", least=0),
    "train.sampling.alpha": Key("number", 0.2, "", idle="mixup: DeepProfiler does not use it either"),
    "train.validation.frequency": Key("int", 1, "epochs between validations", least=1),
    "train.validation.top_k": Key("int", 5, "of the top-k accuracy", least=1),
    "train.validation.batch_size": Key("int", 32, "crops", least=1),
    "train.validation.frame": Key("text", "val", "", idle="validation always takes the validation sites"),
    "train.validation.sample_first_crops": Key("bool", True, "", idle="validation takes a fixed sample of all sites"),
    "profile.feature_layer": Key("text", "pool5", "layer whose output is the profile"),
    "profile.checkpoint": Key("text", None, 'file below outputs/EXP/checkpoint, or "None" for ImageNet weights'),
    "profile.batch_size": Key("int", 64, "crops", least=1),
    "profile.use_pretrained_input_size": Key(
        "int", None, "side to which each channel is resized: ImageNet mode", least=32
    ),
}
RENAMED = {
    "train.partition.training_values": "train.partition.training",
    "train.partition.validation_values": "train.partition.validation",
}
"""Older spellings which still stand in shipped configurations."""

PATHS = (
    "root",
    "locations",
    "config",
    "images",
    "metadata",
    "intensities",
    "compressed_images",
    "single_cell_set",
    "results",
    "checkpoints",
    "logs",
    "summaries",
    "features",
)
"""What the "paths" object may override."""

_KINDS: dict[str, tuple[str, Any]] = {
    "text": ("a text", lambda v: isinstance(v, str)),
    "int": ("a whole number", lambda v: _is_number(v) and float(v).is_integer()),
    "number": ("a number", lambda v: _is_number(v)),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "texts": ("a list of texts", lambda v: isinstance(v, list) and bool(v) and all(isinstance(x, str) for x in v)),
    "values": ("a list of values", lambda v: isinstance(v, list) and all(isinstance(x, (str, int, float)) for x in v)),
    "any": ("anything", lambda _: True),
}


@dataclass(frozen=True)
class Config:
    """One configuration, looked up by dotted key: `config["train.model.epochs"]`.

    Attributes:
        values: what the file says, by dotted key.
        paths: what its "paths" object says.
        source: the file, for messages.
        notes: one line for each key that was read and changes nothing, or that is not known at all.
    """

    values: Mapping[str, Any]
    paths: Mapping[str, str] = field(default_factory=dict)
    source: str = "the configuration"
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        """The value of a dotted key, or its default.

        Raises:
            ConfigError: the key is absent and has no default.
        """
        known = KEYS[key]
        value = self.values.get(key, known.default)
        if value is REQUIRED:
            raise ConfigError(f"{self.source} lacks {key} ({_KINDS[known.kind][0]}): {known.told}")
        return value

    def need(self, key: str, what_for: str) -> Any:
        """The value of a key that this step cannot do without.

        Raises:
            ConfigError: neither the file nor a default says it.
        """
        value = self[key]
        if value is None:
            known = KEYS[key]
            raise ConfigError(
                f"{self.source} lacks {key} ({_KINDS[known.kind][0]}), needed to {what_for}: {known.told}"
            )
        return value

    @property
    def channels(self) -> list[str]:
        """Channel columns in the order in which the network sees them."""
        return list(self["dataset.images.channels"])

    @property
    def target(self) -> str:
        """The column whose values are the classes: the first target, or else the label field.

        Raises:
            ConfigError: the configuration names neither.
        """
        targets = self["train.partition.targets"]
        label = self["dataset.metadata.label_field"]
        if not targets and not label:
            raise ConfigError(f"{self.source} names no treatments: set dataset.metadata.label_field to their column")
        return str(targets[0] if targets else label)

    @property
    def uses_outlines(self) -> bool:
        """Whether cells come with outlines, from which masks are made."""
        return bool(self["prepare.outlines"])


def read_config(path: Path) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigError: no such file, not JSON, a key missing, misspelt, of the wrong kind, or one not to be honoured.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no configuration at {path} ({error.strerror}): name one below inputs/config") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return check_config(raw, str(path))


def check_config(raw: Any, source: str = "the configuration") -> Config:
    """Check a configuration that is already parsed; see `read_config`."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} holds no JSON object")
    paths = raw.get("paths", {})
    unknown = sorted(set(paths) - set(PATHS)) if isinstance(paths, dict) else ["(not an object)"]
    if unknown:
        raise ConfigError(f"{source}: paths.{unknown[0]} is not known; known: {', '.join(PATHS)}")
    values: dict[str, Any] = {}
    notes: list[str] = []
    for found, value in _flatten({k: v for k, v in raw.items() if k != "paths"}):
        key = RENAMED.get(found, found)
        if key in KEYS:
            values[key] = _checked(key, value, source)
            if KEYS[key].idle:
                notes.append(f"{key} changes nothing: {KEYS[key].idle}")
            continue
        near = difflib.get_close_matches(found, KEYS, n=1, cutoff=0.9)
        if near:
            raise ConfigError(f"{source}: there is no key {found}; did you mean {near[0]}?")
        notes.append(f"{found} is not known here and changes nothing")
    if len(values.get("train.partition.targets") or ()) > 1:
        targets = values["train.partition.targets"]
        notes.append(f"train.partition.targets: only {targets[0]} is predicted, not {', '.join(targets[1:])}")
    config = Config(values, paths, source, tuple(notes))
    _check_together(config)
    return config


def _check_together(config: Config) -> None:
    """Refuse what is wrong only in combination, and what is required by every step."""
    channels = config.channels
    if len(set(channels)) != len(channels):
        raise ConfigError(f"{config.source}: dataset.images.channels repeats a channel: {channels}")
    _ = config.target
    if config["dataset.locations.mask_objects"] and not config.uses_outlines:
        raise ConfigError(
            f"{config.source}: dataset.locations.mask_objects is true, but prepare.outlines is empty: set it to any "
            "text and give inputs/metadata/outlines.csv, or set mask_objects to false"
        )
    both = {str(v) for v in config["train.partition.training"]} & {str(v) for v in config["train.partition.validation"]}
    if both:
        raise ConfigError(f"{config.source}: {sorted(both)} stand in training and in validation: a site may be in one")
    blocks = config[_PARAMS + "conv_blocks"]
    if config["train.model.name"] == "efficientnet" and blocks > 7:
        raise ConfigError(f"{config.source}: {_PARAMS}conv_blocks is {blocks}, but EfficientNet has B0 to B7")


def _flatten(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in raw.items():
        key = prefix + str(name)
        if isinstance(value, dict) and key not in KEYS:
            yield from _flatten(value, key + ".")
        else:
            yield key, value


def _checked(key: str, value: Any, source: str) -> Any:
    known = KEYS[key]
    told, fits = _KINDS[known.kind]
    if value is None and known.default is None:
        return None
    if not fits(value):
        raise ConfigError(f"{source}: {key} must be {told}, found {json.dumps(value)}: {known.told or known.idle}")
    if known.choices and value not in known.choices:
        raise ConfigError(f"{source}: {key} must be one of {', '.join(known.choices)}, found {json.dumps(value)}")
    if known.least is not None and value < known.least:
        raise ConfigError(f"{source}: {key} must be at least {known.least}, found {value}")
    return int(value) if known.kind == "int" else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration, for editors and for other programs."""
    kinds: dict[str, dict[str, Any]] = {
        "text": {"type": "string"},
        "int": {"type": "integer"},
        "number": {"type": "number"},
        "bool": {"type": "boolean"},
        "texts": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "values": {"type": "array", "items": {"type": ["string", "number"]}},
        "any": {},
    }
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of a single-cell profiling project",
        "type": "object",
        "properties": {"paths": {"type": "object", "properties": {name: {"type": "string"} for name in PATHS}}},
    }
    for key, known in KEYS.items():
        node = schema
        *groups, name = key.split(".")
        for group in groups:
            node = node["properties"].setdefault(group, {"type": "object", "properties": {}})
        leaf = dict(kinds[known.kind])
        if known.default is None and "type" in leaf:
            leaf["type"] = [leaf["type"], "null"]
        leaf["description"] = known.told or f"Changes nothing: {known.idle}."
        if known.choices:
            leaf["enum"] = list(known.choices)
        if known.least is not None:
            leaf["minimum"] = known.least
        if known.default is REQUIRED:
            node.setdefault("required", []).append(name)
        elif known.default is not None:
            leaf["default"] = known.default
        node["properties"][name] = leaf
    schema["required"] = ["dataset"]
    return schema


def example_config() -> dict[str, Any]:
    """A configuration that spells out every honoured key, for `scripts/cells setup`."""
    raw: dict[str, Any] = {}
    told = {
        "dataset.metadata.label_field": "pert_name",
        "dataset.metadata.control_value": "DMSO",
        "dataset.images.channels": ["DNA", "RNA", "ER", "AGP", "Mito"],
        "train.partition.targets": ["pert_name"],
        "profile.checkpoint": "best",
    }
    for key, known in KEYS.items():
        value = told.get(key, known.default)
        if known.idle or value is None:
            continue
        node = raw
        *groups, name = key.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return raw
