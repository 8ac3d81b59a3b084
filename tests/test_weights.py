"""State dicts are put down the same way every time, and a head on its backbone is the model that was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from marten.architectures import build_network, find_architecture
from marten.errors import CardError, TrainingError
from marten.heads import DEFAULT_HEAD, assemble, save_head
from marten.weights import load_model, save_model, start_weights
from modelspec import ModelCard, ModelSpec, load_state_dict


def lite0(settings: dict[str, object]) -> tuple[torch.nn.Module, ModelCard]:
    """efficientnet_lite0 on ImageNet's backbone with a head drawn from a seed."""
    architecture = find_architecture("efficientnet_lite0")
    torch.manual_seed(3)
    network = build_network(architecture.arch, {"num_classes": 2})
    start_weights(network, architecture, "imagenet")
    spec = ModelSpec("pets", architecture.arch, ("cat", "dog"), {"num_classes": 2}, preprocess=architecture.preprocess)
    return network, ModelCard(spec, "", training={"conv_net": "efficientnet_lite0", **settings})


def test_first_weights_from_no_file_are_told_by_their_flag() -> None:
    # it said to train them
    architecture = find_architecture("cat_dog_conv_net")
    with pytest.raises(TrainingError, match=r"--weights takes .* there is no file nowhere\.pth"):
        start_weights(build_network(architecture.arch, {}), architecture, "nowhere.pth")


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    network, card = lite0({})
    save_model(tmp_path / "plain.pth", network.state_dict(), card)
    other = network.to(memory_format=torch.channels_last)
    save_model(tmp_path / "another_name.pth", other.state_dict(), card)
    assert (tmp_path / "plain.pth").read_bytes() == (tmp_path / "another_name.pth").read_bytes()


def test_a_head_on_its_backbone_is_the_model_again(tmp_path: Path) -> None:
    network, card = lite0({})
    save_model(tmp_path / "model.pth", network.state_dict(), card)
    save_head(tmp_path / "model.pth", tmp_path / "small.pth")
    assert (tmp_path / "small.pth").stat().st_size < 20_000
    assembled = assemble(tmp_path / "small.pth", tmp_path / "whole.pth")
    assert assembled.spec.name == "small"
    assert (tmp_path / "whole.pth").read_bytes() == (tmp_path / "model.pth").read_bytes()


def test_a_trained_backbone_cannot_be_kept_as_a_head(tmp_path: Path) -> None:
    network, card = lite0({})
    with torch.no_grad():
        network.get_parameter("_conv_stem.weight")[0, 0, 0, 0] += 1
    save_model(tmp_path / "model.pth", network.state_dict(), card)
    with pytest.raises(TrainingError, match=r"_conv_stem\.weight was trained too"):
        save_head(tmp_path / "model.pth", tmp_path / "small.pth")


def test_another_head_or_backbone_is_refused(tmp_path: Path) -> None:
    for suffix in (".pth", ".json"):
        shutil.copyfile(DEFAULT_HEAD.with_suffix(suffix), tmp_path / f"dogs_vs_cats{suffix}")
    head = tmp_path / "dogs_vs_cats.pth"
    card = ModelCard.read(head.with_suffix(".json"))
    other = replace(card, training={**card.training, "backbone": {"package": "p", "sha256": "0"}})
    head.with_suffix(".json").write_text(other.to_json())
    with pytest.raises(CardError, match="is not the backbone"):
        assemble(head, tmp_path / "whole.pth")
    head.write_bytes(head.read_bytes() + b" ")
    with pytest.raises(CardError, match="sha256 differs"):
        assemble(head, tmp_path / "whole.pth")
    assert not (tmp_path / "whole.pth").exists()


def test_weights_of_another_card_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    # B1-10, B0-21
    for suffix in (".pth", ".json"):
        shutil.copyfile(tiny_model().with_suffix(suffix), tmp_path / f"m{suffix}")
    state = load_state_dict(tmp_path / "m.pth")
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "m.pth")
    with pytest.raises(CardError, match="no bare state dict"):
        load_model(tmp_path / "m.pth")
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CardError, match="sha256 differs"):
        load_model(tmp_path / "m.pth")


def test_the_default_model_knows_the_cats_and_dogs_it_was_not_trained_on(data_dir: Path, tmp_path: Path) -> None:
    from marten.datasets import find_pictures, inspect, split
    from marten.predict import predict

    assemble(DEFAULT_HEAD, tmp_path / "model.pth")
    network, card = load_model(tmp_path / "model.pth")
    pictures = inspect(find_pictures(data_dir / "dogs-vs-cats"), card.spec.preprocess)
    assert pictures.digest == card.data["digest"]
    training, validation = split(pictures.samples, card.training["validation_split"], card.training["seed"])
    assert (len(training), len(validation)) == (1602, 400)
    some = validation[::4]
    told = predict(network, card.spec, [sample.path for sample in some])
    right = sum(card.spec.labels[s.label] in (p.answer or {}) for s, p in zip(some, told, strict=True))
    assert right >= 97
