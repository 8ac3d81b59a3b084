"""Networks that torchvision and timm keep: found by their names, with the head, preprocessing and weights they have."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from marten.architectures import build_network, find_architecture, find_preprocess
from marten.archive import plan_archive, write_archive
from marten.errors import CHECKPOINTED, DONE, TrainingError, UsageError
from marten.weights import start_weights
from modelspec import ModelCard
from tests.runs import run_once

NEEDS_TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
SMALL = ["mobilenet_v3_small", pytest.param("timm_test_resnet", marks=NEEDS_TIMM)]


@pytest.mark.parametrize(
    ("name", "head", "size", "share"),
    [
        ("mobilenet_v3_small", "classifier.3.", 224, 224 / 256),
        ("densenet121", "classifier.", 224, 224 / 256),
        ("inception_v3", "fc.", 299, 299 / 342),
        ("regnet_y_400mf", "fc.", 224, 224 / 232),
        ("vit_b_32", "heads.head.", 224, 224 / 256),
        ("squeezenet1_1", "classifier.1.", 224, 224 / 256),
        pytest.param("timm_vit_tiny_patch16_224", "head.", 224, 0.9, marks=NEEDS_TIMM),
        pytest.param("timm_convnext_atto", "head.fc.", 224, 0.875, marks=NEEDS_TIMM),
    ],
)
def test_head_and_preprocessing_are_what_the_registry_says(name: str, head: str, size: int, share: float) -> None:
    found = find_architecture(name)
    assert found.head == head
    assert found.preprocess.size_px == (size, size)
    assert found.preprocess.crop_fraction == pytest.approx(share)
    network = build_network(found.arch, {**found.arch_args, "num_classes": 7}).eval()
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_our_own_networks_keep_their_names() -> None:
    assert find_architecture("resnet18").arch == "resnet"
    assert find_architecture("efficientnet_b0").arch == "efficientnet"


def test_preprocessing_of_another_network() -> None:
    base, small = find_architecture("base_cnn"), find_architecture("mobilenet_v3_small")
    assert find_preprocess("own", base) == base.preprocess
    assert base.preprocess.resize == "squash"
    assert find_preprocess("resnet", base) == find_architecture("resnet50").preprocess
    assert find_preprocess("base_cnn", small) == base.preprocess
    before = torch.random.get_rng_state()
    assert find_preprocess("inception_v3", small).size_px == (299, 299)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(UsageError, match=r"--pre inception_v3 gives pictures of 299x299, which base_cnn cannot take: "):
        find_preprocess("inception_v3", base)
    with pytest.raises(UsageError, match="no network called 'resnet19'"):
        find_preprocess("resnet19", base)


def test_a_run_learns_and_is_archived_with_the_preprocessing_that_it_was_given(drawn_set: Path, tmp_path: Path) -> None:
    assert run_once(drawn_set, tmp_path, 2, pre="resnet") == CHECKPOINTED
    with pytest.raises(UsageError, match="--pre was resnet, is own"):
        run_once(drawn_set, tmp_path, pre="own")
    assert run_once(drawn_set, tmp_path, pre="resnet") == DONE
    assert ModelCard.read(tmp_path / "model.json").spec.preprocess == find_architecture("resnet18").preprocess
    archive = plan_archive(tmp_path / "model.pth", export_path=tmp_path / "store", parts=tmp_path / "parts")
    assert write_archive(archive) <= 3e-5


def test_every_classifier_of_torchvision_is_found_or_ours() -> None:
    """Of the big ones nothing but the shapes is made."""
    for name in torchvision.models.list_models(module=torchvision.models):
        if "regnet" not in name:
            assert find_architecture(name).head, name


def test_dropout_is_that_of_the_last_layers_alone() -> None:
    network = build_network("torchvision_network", {"name": "swin_t", "dropout": 0.4})
    assert {m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    network = build_network("torchvision_network", {"name": "mobilenet_v3_small", "dropout": 0.4})
    assert [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)] == [0.4]


@pytest.mark.parametrize("name", SMALL)
def test_one_trains_is_packed_and_answers_as_its_state_dict(name: str, drawn_set: Path, tmp_path: Path) -> None:
    assert run_once(drawn_set, tmp_path, conv_net=name, epochs=1, weights="none") == 0
    card = ModelCard.read(tmp_path / "model.json")
    assert card.spec.arch_args["name"] == name.removeprefix("timm_")
    archive = plan_archive(tmp_path / "model.pth", export_path=tmp_path / "store", parts=tmp_path / "parts")
    assert write_archive(archive) <= 3e-5


@pytest.mark.parametrize("name", SMALL)
def test_weights_of_a_local_file_fit_by_their_names(name: str, tmp_path: Path) -> None:
    found = find_architecture(name)
    thousand = build_network(found.arch, {**found.arch_args, "num_classes": 1000})
    torch.save(thousand.state_dict(), tmp_path / "imagenet.pth")
    network = build_network(found.arch, {**found.arch_args, "num_classes": 2})
    start_weights(network, found, str(tmp_path / "imagenet.pth"))
    own, theirs = network.state_dict(), thousand.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in own if not key.startswith(found.head))


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("densenet121", "torchvision.models.get_model"),
        pytest.param("timm_test_resnet", "timm.create_model", marks=NEEDS_TIMM),
    ],
)
def test_a_hub_out_of_reach_is_told_in_one_line(name: str, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_architecture(name)
    network = build_network(found.arch, {**found.arch_args, "num_classes": 2})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(build, fail)
    with pytest.raises(TrainingError, match=f"{name}.* cannot be fetched.*no route to host.*--weights FILE"):
        start_weights(network, found, "auto")


def test_names_that_nobody_knows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no network called 'resnet19'.*torchvision and timm; did you mean resnet18"):
        find_architecture("resnet19")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"timm_resnet18d takes the package timm: pip install -r requirements-timm\.txt"
    ):
        find_architecture("timm_resnet18d")


@NEEDS_TIMM
def test_a_name_that_timm_does_not_know_is_answered_with_near_ones() -> None:
    with pytest.raises(UsageError, match="knows no network called 'resnet18_nope'"):
        find_architecture("timm_resnet18_nope")
