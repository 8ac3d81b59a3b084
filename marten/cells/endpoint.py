"""Make a network of cells servable: a card by which scripts/archive packs it and TorchServe answers strips of crops.

A crop of many channels travels as `export` writes it: one grey PNG, its channels side by side. The answer is the
profile of the crop, or the probabilities of its treatment.
"""

from __future__ import annotations

from pathlib import Path

from marten.cells.config import Config
from marten.cells.errors import CellsError
from marten.cells.index import read_index
from marten.cells.networks import find_checkpoint, load_profiler, network_args
from marten.cells.project import Project
from modelspec import ModelCard, ModelSpec, Preprocess, sha256_file


def strip_preprocess(config: Config) -> Preprocess:
    """How a posted strip becomes the network's input: its own size, values 0..1, nothing else."""
    box = int(config["dataset.locations.box_size"])
    return Preprocess(
        size_px=(box, box * len(config.channels)), resize="squash", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )


def make_endpoint(
    project: Project, name: str, output: Path | None = None, checkpoint: str | None = None, layer: str | None = None
) -> Path:
    """Write a model and its card that scripts/archive takes.

    Args:
        project: whose checkpoint, DeepProfiler's .hdf5 or ours.
        name: of the endpoint.
        output: folder for model_NAME.pth and model_NAME.json; None is outputs/EXP/endpoint.
        checkpoint: replaces profile.checkpoint.
        layer: whose features are the answer; the class layer gives class probabilities; None takes
            profile.feature_layer.

    Returns:
        Path of the weights.

    Raises:
        CellsError: ImageNet weights, which see single channels; masked crops, whose mask is not posted; or classes
            without names.
    """
    from marten.provenance import provenance
    from marten.weights import save_model

    config = project.config
    if config["dataset.locations.mask_objects"]:
        raise CellsError(
            "dataset.locations.mask_objects is true: a posted crop brings no mask, serve an unmasked network"
        )
    profiler = load_profiler(project, checkpoint, layer)
    path = find_checkpoint(project, checkpoint)
    if profiler.repeats or path is None:
        raise CellsError("a network with ImageNet weights sees one channel at a time: train one, or name a checkpoint")
    arch, args = network_args(config)
    classes = int(profiler.network.state_dict()["ClassProb.weight"].shape[0])
    is_classifier = profiler.layer == "ClassProb"
    labels: tuple[str, ...] = ()
    if is_classifier:
        labels = profiler.labels or read_index(project).classes
        if len(labels) != classes:
            raise CellsError(f"{path} tells {classes} classes apart, but the index names {len(labels)}: {list(labels)}")
    args |= {"num_classes": classes, "strips": True, "output": "" if is_classifier else profiler.layer}
    spec = ModelSpec(
        name=name,
        arch=arch,
        labels=labels,
        arch_args=args,
        task="classification" if is_classifier else "embedding",
        topk=max(1, len(labels)),
        preprocess=strip_preprocess(config),
    )
    card = ModelCard(
        spec=spec,
        weights_sha256="",
        data={"channels": config.channels, "layer": profiler.layer, "strip": "8-bit grey PNG, channels side by side"},
        training={"started_from": f"{path.name} sha256 {sha256_file(path)}"},
        provenance=provenance(),
    )
    weights = (output or project.results / "endpoint") / f"model_{name}.pth"
    save_model(weights, profiler.network.state_dict(), card)
    return weights
