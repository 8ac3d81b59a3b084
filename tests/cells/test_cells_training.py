"""Training learns, is balanced, is judged on fixed crops, and goes on after a stop as if there had been none."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision

from marten.architectures import build_network
from marten.cells.augment import augment
from marten.cells.config import check_config
from marten.cells.crop_batches import CropBatches, CropSet
from marten.cells.errors import CellsError, ConfigError
from marten.cells.export import export_cells
from marten.cells.feature_files import npz_path
from marten.cells.images import encode_png, read_plane
from marten.cells.index import read_index
from marten.cells.networks import load_profiler, network_args
from marten.cells.profiling import profile_cells
from marten.cells.recipe import imagenet_state, learning_rate, make_optimizer
from marten.cells.scores import Scores
from marten.cells.store import CropReader
from marten.cells.training import CellTraining, train_cells
from marten.devices import choose_runtime
from marten.errors import CHECKPOINTED, UsageError
from marten.files import ROOT
from modelspec import ModelCard

FP32 = choose_runtime("cpu", "fp32")


class Never:
    reason = ""


class After:
    """Stops after some batches, as a scheduler's signal does."""

    def __init__(self, batches):
        self.left = batches

    @property
    def reason(self):
        self.left -= 1
        return "SIGTERM" if self.left <= 0 else ""


@pytest.fixture
def told(tiny):
    """The tiny project, its treatments told by which channel is coarse, with crops and a cnn for 3 epochs."""
    for row in tiny.rows():
        channel = {"DMSO": "DNA", "motif": "RNA", "NA": "Mito"}[row["pert_name"]]
        path = tiny.image(row["Metadata_Plate"], row["Metadata_Well"], row["Metadata_Site"], channel)
        plane = read_plane(path)
        path.write_bytes(encode_png(np.kron(plane[::6, ::6], np.ones((6, 6), np.uint8))[:90, :110]))
    tiny.config(
        **{
            "train.model.epochs": 3,
            "train.model.augmentations": True,
            "train.model.params": {"conv_blocks": 2, "feature_dim": 16, "learning_rate": 0.02, "batch_size": 8},
            "train.validation": {"top_k": 2},
        }
    )
    export_cells(tiny.open())
    return tiny


def run(tiny, exp="results", interrupt=None, **kwargs):
    training = CellTraining(tiny.open(experiment=exp), FP32, **kwargs)
    training.resume()
    return training, training.go_on(interrupt or Never())


def log(tiny, exp="results"):
    with open(tiny.root / f"outputs/{exp}/logs/log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_it_learns_and_its_profiles_tell_treatments_apart(told):
    told.config(**{"train.model.epochs": 14, "train.model.augmentations": False})
    _, code = run(told)
    assert code == 0
    rows = log(told)
    assert len(rows) == 14
    assert float(rows[-1]["loss"]) < 0.6 < float(rows[0]["loss"])
    card = ModelCard.read(told.root / "outputs/results/checkpoint/model.json")
    assert card.spec.labels == ("DMSO", "NA", "motif")
    assert card.metrics["validation_accuracy"]["value"] > 0.7
    assert card.data["channels"] == ["DNA", "RNA", "Mito"]
    project = told.open()
    profiler = load_profiler(project, layer="ClassProb")
    profile_cells(project, profiler, FP32)
    right, seen = 0, 0
    for site in read_index(project).having([1]):
        probabilities = np.load(npz_path(project, site), allow_pickle=True)["features"]
        right += int((probabilities.argmax(1) == card.spec.labels.index(site.row["pert_name"])).sum())
        seen += len(probabilities)
    judged = card.metrics["validation_accuracy"]
    assert seen == judged["count"]
    # training saw the same cells as 8-bit crops, which may turn a cell or two
    assert abs(right - judged["hits"]) <= 2


@pytest.mark.parametrize("batches", [1, 5, 9])
def test_a_stopped_run_ends_in_the_same_bytes(told, batches):
    run(told, "whole")
    _, code = run(told, "stopped", After(batches))
    assert code == CHECKPOINTED
    run(told, "stopped", After(4))
    while run(told, "stopped")[1] == CHECKPOINTED:
        pass
    first, second = (told.root / f"outputs/{exp}/checkpoint/model.pth" for exp in ("whole", "stopped"))
    assert first.read_bytes() == second.read_bytes()
    assert log(told, "whole") == log(told, "stopped")


def test_a_stop_while_validating_is_a_stop_at_once(told):
    whole, _ = run(told, "whole")
    steps = -(-len(whole.crops.epoch_order(0, 0)) // whole.batch_size)
    stopped, code = run(told, "stopped", After(steps + 1))
    assert code == CHECKPOINTED
    assert (stopped.at.epoch, stopped.at.batch, stopped.at.history) == (0, steps, [])
    assert run(told, "stopped")[1] == 0
    first, second = (told.root / f"outputs/{exp}/checkpoint/model.pth" for exp in ("whole", "stopped"))
    assert first.read_bytes() == second.read_bytes()
    assert log(told, "whole") == log(told, "stopped")


def test_online_labels_move_with_the_predictions_and_survive_a_stop(told):
    told.config(**{"train.model.crop_generator": "online_labels_cropgen", "train.model.params.online_lambda": 0.5})
    whole, _ = run(told, "whole")
    run(told, "stopped", After(6))
    stopped, _ = run(told, "stopped")
    torch.testing.assert_close(whole.learner.soft, stopped.learner.soft, rtol=0, atol=0)
    torch.testing.assert_close(whole.learner.soft.sum(1), torch.ones(len(whole.learner.soft)))
    files = sorted((told.root / "outputs/whole/soft_labels").iterdir())
    assert [path.name for path in files] == ["0000.csv", "0001.csv", "0002.csv"]
    assert files[0].read_text() != files[2].read_text()


def test_another_configuration_is_not_resumed_into(told):
    run(told, interrupt=After(3))
    told.config(**{"train.model.params.learning_rate": 0.5})
    with pytest.raises(UsageError, match="checkpoint of another run"):
        run(told)
    told.config(**{"train.model.params.learning_rate": 0.02})
    with pytest.raises(UsageError, match="seed"):
        run(told, seed=1)


def test_a_finished_model_is_not_trained_over_unasked(told):
    run(told)
    with pytest.raises(CellsError, match="is there already"):
        train_cells(told.open(), FP32)


def test_epochs_are_balanced_seeded_and_complete(told):
    rows = told.rows()
    gone = [row for row in rows if row["pert_name"] == "NA" and row["Metadata_Site"] == "2"]
    told.write_rows([row for row in rows if row not in gone])
    export_cells(told.open(), overwrite=True)
    crops = CropSet(told.open().config, told.open().crops)
    order = crops.epoch_order(seed=3, epoch=1)
    counts = np.bincount(crops.targets[order])
    members = np.bincount(crops.targets[crops.training])
    assert set(counts) == {int(np.median(members))}
    assert set(order) <= set(crops.training.tolist())
    small = int(members.argmin())
    assert set(crops.training[crops.targets[crops.training] == small]) <= set(order)
    np.testing.assert_array_equal(order, crops.epoch_order(seed=3, epoch=1))
    assert (order != crops.epoch_order(seed=3, epoch=2)).any()


def test_without_validation_crops_whole_sites_are_held_out(told):
    export_cells(told.open(single_cells="sampled"), sample=True)
    crops = CropSet(told.open().config, told.open(single_cells="sampled").crops)
    learnt, judged = ({crops.reader.rows[i]["Key"] for i in part} for part in (crops.training, crops.validation))
    assert judged
    assert not learnt & judged
    assert "training sites" in crops.told
    with_plate = told.open(single_cells="both")
    export_cells(with_plate, sample=True, validation=True, factor=0.5)
    crops = CropSet(with_plate.config, with_plate.crops)
    assert {crops.reader.rows[i]["Key"].split("/")[0] for i in crops.validation} == {"P2"}


def test_shards_train_like_files(told):
    shards = told.open(single_cells="shards")
    export_cells(shards, kind="shards")
    one, other = (CropSet(told.open().config, folder) for folder in (told.open().crops, shards.crops))
    first = list(CropBatches(one, 2, 0).read(one.training, 7))
    second = list(CropBatches(other, 1, 5).read(other.training, 7))
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert first[0].shape == (7, 3, 16, 16)
    assert first[0].max() <= 1


@pytest.mark.parametrize(
    ("break_it", "told_so"),
    [
        (lambda path: path.unlink(), "no table of crops"),
        (
            lambda path: path.write_text(path.read_text().replace("pert_name", "gene", 1)),
            "lacks the column 'pert_name'",
        ),
        (lambda path: path.write_text(path.read_text().splitlines()[0] + "\n"), "is empty"),
        (lambda path: path.write_text(path.read_text().replace(",0,P1", ",7,P1")), "has Split in"),
    ],
)
def test_tables_of_crops_that_cannot_be_trained_on(told, break_it, told_so):
    break_it(told.open().crops / "sc-metadata.csv")
    with pytest.raises(CellsError, match=told_so):
        CellTraining(told.open(), FP32)


def test_a_damaged_crop_stops_training_by_name(told):
    project = told.open()
    row = CropReader(project.crops).rows[0]
    path = project.crops / row["Image_Name"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CellsError, match=r"P1/A01/1/0@.*truncated"):
        run(told)


def rates(schedule, epochs, losses=()):
    raw = {"dataset": {"metadata": {"label_field": "t"}, "images": {"channels": ["A"]}}}
    raw["train"] = {"model": {"epochs": epochs, "params": {"learning_rate": 0.005}, "lr_schedule": schedule}}
    config = check_config(raw)
    return [learning_rate(config, epoch, losses[:epoch]) for epoch in range(epochs)]


def test_the_cosine_schedule_is_deepprofilers():
    found = rates("cosine", 6)
    np.testing.assert_allclose(found[:5], [0.001, 0.00125, 0.005 / 3, 0.0025, 0.005])
    assert found[5] == pytest.approx(3.3494e-4, rel=1e-4)
    assert all(rate > 0 for rate in rates("cosine", 3))


def test_other_schedules():
    assert rates(None, 3) == [0.005] * 3
    assert rates({"epoch": [2, 4], "lr": [0.1, 0.2]}, 6) == [0.005, 0.005, 0.1, 0.1, 0.2, 0.2]
    flat = rates("plateau", 14, [1.0] * 14)
    assert flat[:6] == [0.005] * 6
    assert flat[6] == pytest.approx(0.0005)
    assert min(flat) >= 1e-4
    with pytest.raises(ConfigError, match="lr_schedule must be"):
        rates("polynomial", 3)
    with pytest.raises(ConfigError, match="equal length"):
        rates({"epoch": [1], "lr": []}, 3)


def test_kernels_alone_are_decayed():
    raw = {"dataset": {"metadata": {"label_field": "t"}, "images": {"channels": ["A"]}}}
    network = build_network("efficientnet", {"num_classes": 2, "channels": 1})
    kernels, others = make_optimizer(check_config(raw), network).param_groups
    assert kernels["weight_decay"] == pytest.approx(2e-5)
    assert others["weight_decay"] == 0
    assert all(p.ndim > 1 for p in kernels["params"])
    assert kernels["nesterov"]


def test_augmentation_is_seeded_and_keeps_what_a_crop_is():
    crops = torch.rand(64, 2, 15, 15)
    one, other = (augment(crops, torch.Generator().manual_seed(5)) for _ in range(2))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert one.shape == crops.shape
    assert (one - crops).abs().amax((1, 2, 3)).min() > 0
    dot = torch.zeros(400, 1, 9, 9)
    dot[:, :, 2, 4] = 1
    turned = augment(dot, torch.Generator().manual_seed(0))
    places = {divmod(int(t.argmax()), 9) for t in turned[:, 0]}
    assert {(2, 4), (4, 2), (6, 4), (4, 6)} <= places
    mean = augment(torch.full((500, 1, 4, 4), 0.5), torch.Generator().manual_seed(1)).mean((1, 2, 3))
    assert 0.39 < mean.min() < 0.42
    assert 0.58 < mean.max() < 0.61


def test_scores_by_hand():
    scores = Scores(3, 2)
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.4, 0.1], [0.2, 0.5, 0.3]])
    scores.add(probs, torch.tensor([0, 1, 1, 2]), 4.0)
    assert (scores.accuracy, scores.top_k_accuracy, scores.loss) == (0.5, 1.0, 1.0)
    assert scores.balanced_accuracy == pytest.approx((1 + 0.5 + 0) / 3)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 0.5 + 0) / 3)
    assert scores.class_precision == pytest.approx((0.5 + 0.5 + 0) / 3)
    again = Scores(3, 2, scores.state())
    assert (again.count, again.macro_f1) == (4, scores.macro_f1)
    assert math.isfinite(Scores(3, 1).loss)


def test_imagenet_weights_fit_and_the_first_layer_is_cycled():
    torch.manual_seed(0)
    theirs = torchvision.models.efficientnet_b0(weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3
    ours = build_network("efficientnet", {"num_classes": 1000}).eval()
    ours.load_state_dict(imagenet_state(theirs.state_dict(), ours))
    # sides for which both kinds of padding are the same at every stride
    x = torch.rand(2, 3, 33, 33)
    with torch.inference_mode():
        torch.testing.assert_close(
            ours.features(x), theirs.avgpool(theirs.features(x)).flatten(1), rtol=1e-4, atol=1e-5
        )
    five = build_network("efficientnet", {"num_classes": 3, "channels": 5})
    state = imagenet_state(theirs.state_dict(), five)
    torch.testing.assert_close(state["stem_conv.weight"][:, 3], theirs.features[0][0].weight[:, 0])
    torch.testing.assert_close(state["stem_conv.weight"][:, 4], theirs.features[0][0].weight[:, 1])


@pytest.mark.parametrize(("name", "blocks", "arch"), [("resnet", 50, "resnet_v2"), ("cnn", 3, "cell_cnn")])
def test_other_networks_take_any_channels_and_name_their_layers(tiny, name, blocks, arch):
    tiny.config(**{"train.model.name": name, "train.model.params": {"conv_blocks": blocks, "feature_dim": 32}})
    folder, args = network_args(tiny.open().config)
    assert folder == arch
    network = build_network(folder, {**args, "num_classes": 4}).eval()
    x = torch.rand(2, 3, 64, 48)
    with torch.inference_mode():
        assert network(x).shape == (2, 4)
        for layer in network.layers:
            assert torch.isfinite(network.features(x, layer)).all()
    tiny.config(**{"train.model.params": {"conv_blocks": 0 if name == "cnn" else 18}})
    with pytest.raises(CellsError, match="conv_blocks"):
        network_args(tiny.open().config)


def test_the_command_trains_saves_and_resumes(told):
    told.config(**{"train.model.epochs": 2})
    command = [sys.executable, str(ROOT / "scripts/cells"), "--root", str(told.root), "train", "--device", "cpu"]
    first = subprocess.run([*command, "--max_runtime", "1s"], capture_output=True, text=True, check=False)
    while first.returncode == CHECKPOINTED:
        first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "Best epoch" in first.stdout
    json.loads((told.root / "outputs/results/checkpoint/model.json").read_text())
    shutil.rmtree(told.root / "outputs/single-cells")
    again = subprocess.run([*command, "--overwrite"], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "run scripts/cells sample or export" in again.stderr
