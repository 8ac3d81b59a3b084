"""A posted strip of a crop is answered as the crop itself is profiled."""

from __future__ import annotations

import json
import subprocess
import zipfile

import numpy as np
import pytest
import torch

from marten.architectures import build_network
from marten.archive import plan_archive, write_archive
from marten.cells.crops import from_strips
from marten.cells.endpoint import make_endpoint
from marten.cells.errors import CellsError
from marten.cells.export import export_cells
from marten.cells.feature_files import npz_path
from marten.cells.images import decode_png, encode_png
from marten.cells.index import read_index
from marten.cells.networks import load_profiler
from marten.cells.profiling import profile_cells
from marten.cells.project import open_project
from marten.cells.store import CropReader
from marten.cells.training import train_cells
from marten.devices import choose_runtime
from marten.readiness import free_ports
from marten.weights import load_model
from tests.servers import Serve, allowed_s

FP32 = choose_runtime("cpu", "fp32")


@pytest.mark.parametrize("arch", ["efficientnet", "resnet_v2", "cell_cnn"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_every_network_folds_strips_back_into_channels(arch, channels):
    torch.manual_seed(0)
    network = build_network(arch, {"num_classes": 3, "channels": channels, "strips": True}).eval()
    crops = torch.rand(2, channels, 32, 32)
    grey = torch.cat(list(crops.transpose(0, 1)), dim=2)[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        torch.testing.assert_close(network(grey), network(crops), rtol=0, atol=0)
        named = build_network(arch, {"num_classes": 3, "channels": channels, "strips": True, "output": "pool5"}).eval()
        named.load_state_dict(network.state_dict())
        torch.testing.assert_close(named(grey), network.features(crops, "pool5"), rtol=0, atol=0)


def test_a_trained_network_answers_posted_crops_with_their_classes(tiny):
    params = {"conv_blocks": 2, "feature_dim": 16, "learning_rate": 0.01, "batch_size": 8}
    tiny.config(**{"train.model.params": params, "profile.feature_layer": "ClassProb"})
    project = tiny.open()
    export_cells(project)
    train_cells(project, FP32)
    reader = CropReader(project.crops)
    data = (project.crops / reader.rows[0]["Image_Name"]).read_bytes()
    network, card = load_model(project.checkpoints / "model.pth")
    profiler = load_profiler(project, layer="ClassProb")
    with torch.inference_mode():
        answer = card.spec.answers(card.spec.logits(network, card.spec.preprocess(data)), topk=3)[0]
        crop = torch.from_numpy(from_strips(decode_png(data)[None], 3))
        expected = profiler.network.features(crop, "ClassProb")[0]
    assert set(answer) == {"DMSO", "NA", "motif"}
    for label, probability in zip(card.spec.labels, expected.tolist(), strict=True):
        assert answer[label] == pytest.approx(probability, abs=1e-6)


def test_an_archive_answers_a_crop_with_its_profile(painting, example, tmp_path):
    """DeepProfiler's checkpoint becomes a .mar; a posted strip gives the profile of its crop."""
    project = open_project(example, "base5.json")
    weights = make_endpoint(
        project, "profiles", tmp_path, str(painting / "reference/oracle_init.hdf5"), layer="block6a_activation"
    )
    network, card = load_model(weights)
    assert card.spec.task == "embedding"
    archive = plan_archive(weights, export_path=tmp_path / "store", parts=tmp_path / "parts")
    assert write_archive(archive) < 1e-6
    with zipfile.ZipFile(archive.mar) as packed:
        assert "efficientnet.py" in packed.namelist()
    reference = np.load(painting / "reference/example_b6a_41744_d03_1.npz", allow_pickle=True)
    names = [f"0@{x}x{y}.png" for x, y in reference["locations"]]
    folder = painting / "reference/crops_mask/41744/d03/1"
    compared = 0
    for path in sorted(folder.glob("*.png")):
        strip = decode_png(path.read_bytes())[:, : 5 * 128]
        with torch.inference_mode():
            answer = card.spec.answers(card.spec.logits(network, card.spec.preprocess(encode_png(strip))))[0]
        found, expected = np.array(answer["embedding"]), reference["features"][names.index(path.name)]
        cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
        assert cosine > 0.9999
        assert np.abs(found - expected).max() < 0.01
        compared += 1
    assert compared == 16


@pytest.mark.server
def test_a_live_torchserve_answers_posted_crops_as_they_are_profiled(tiny, tmp_path):
    """One network twice behind one TorchServe, for features and for classes; strips of three channels are posted."""
    params = {"conv_blocks": 2, "feature_dim": 16, "learning_rate": 0.01, "batch_size": 8}
    tiny.config(**{"train.model.params": params})
    project = tiny.open()
    export_cells(project)
    train_cells(project, FP32)
    layers = {"profiles": "features", "classes": "ClassProb"}
    profiles, labels = {}, {}
    for name, layer in layers.items():
        weights = make_endpoint(project, name, tmp_path / "endpoint", layer=layer)
        write_archive(plan_archive(weights, export_path=tmp_path / "store", parts=tmp_path / "parts"))
        profiler = load_profiler(project, layer=layer)
        profile_cells(project, profiler, FP32, store="npz", overwrite=True)
        labels[name] = profiler.labels
        for site in read_index(project).sites:
            stored = np.load(npz_path(project, site), allow_pickle=True)
            for (x, y), features in zip(stored["locations"], stored["features"], strict=True):
                profiles[name, site.plate, site.well, site.site, f"{x:g}x{y:g}"] = features
    server = Serve(tmp_path / "store", tmp_path / "run", free_ports())
    try:
        words = server.command("start", *layers, "--timeout_s", "600")
        patience_s = allowed_s(120)
        started = subprocess.run(words, capture_output=True, text=True, timeout=patience_s, env=server.environment())
        assert started.returncode == 0, started.stderr
        for row in CropReader(project.crops).rows[::4]:
            crop = row["Image_Name"]
            plate, well, site, cell = crop.removesuffix(".png").split("/")
            for name in layers:
                status, body = server.ask(name, (project.crops / crop).read_bytes())
                assert status == 200, body
                answer = json.loads(body)
                found = np.array(answer["embedding"] if name == "profiles" else [answer[each] for each in labels[name]])
                wanted = profiles[name, plate, well, site, cell.partition("@")[2]]
                assert found.shape == wanted.shape
                # the crop was rounded to 256 levels on its way
                assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.9999
                np.testing.assert_allclose(found, wanted, atol=0.01 * np.abs(wanted).max())
    finally:
        server.run("stop", "--drain_s", "0")
    assert server.leftovers() == []


def test_what_cannot_be_served_is_refused(tiny):
    tiny.config(**{"prepare.outlines": "yes", "dataset.locations.mask_objects": True})
    with pytest.raises(CellsError, match="brings no mask"):
        make_endpoint(tiny.open(), "x")
    tiny.config(**{"dataset.locations.mask_objects": False})
    with pytest.raises(CellsError, match=r"no weights .missing.pth"):
        make_endpoint(tiny.open(), "x", checkpoint="missing.pth")
