"""Defects of DeepProfiler, by name: what went wrong there and must not go wrong here."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys

import imagecodecs
import numpy as np
import pytest
import tifffile

from marten.cells.aggregation import aggregate_cells
from marten.cells.config import check_config
from marten.cells.crop_batches import CropSet
from marten.cells.crops import take_crops
from marten.cells.errors import CellsError, ConfigError
from marten.cells.export import cut_strips, export_cells
from marten.cells.feature_files import is_whole_npz, npz_path
from marten.cells.images import encode_png, read_channels, read_plane
from marten.cells.index import compressed_path, read_index, split_index
from marten.cells.locations import read_locations
from marten.cells.parallel import AHEAD, ordered_map
from marten.cells.prepare import prepare_images
from marten.cells.project import open_project
from marten.cells.recipe import learning_rate
from marten.cells.store import CropReader
from marten.cells.validate import check_project
from marten.files import ROOT


def cells(tiny, *words):
    command = [sys.executable, str(ROOT / "scripts/cells"), "--root", str(tiny.root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=120)


def test_prompt_on_stdin_hangs_a_batch_job(tiny):
    export_cells(tiny.open())
    told = cells(tiny, "export")
    assert told.returncode == 1
    assert "add --overwrite" in told.stderr


@pytest.mark.parametrize(("column", "name"), [("Metadata_Plate", "BR-0011-a"), ("Metadata_Well", "C-3")])
def test_hyphens_in_plate_and_well_break_keys(tiny, column, name):
    rows = tiny.rows()
    before = rows[0][column]
    for row in rows:
        if row[column] == before:
            row[column] = name if column == "Metadata_Plate" else row[column]
    tiny.write_rows(rows)
    if column == "Metadata_Plate":
        (tiny.root / "inputs/locations/P1").rename(tiny.root / f"inputs/locations/{name}")
        (tiny.root / "outputs/compressed/images/P1").rename(tiny.root / f"outputs/compressed/images/{name}")
    project = tiny.open()
    report = export_cells(project)
    assert (report.no_locations, report.problems) == ([], [])
    assert any(name in row["Key"].split("/") for row in CropReader(project.crops).rows)


def test_compression_flattens_names_and_overwrites(tiny):
    rows = tiny.rows()
    rows[0]["DNA"], rows[1]["DNA"] = "day1/a.tif", "day2/a.tif"
    tiny.write_rows(rows)
    with pytest.raises(CellsError, match="would both be written"):
        prepare_images(tiny.open())


def test_tif_is_replaced_anywhere_in_a_name(tiny):
    project = tiny.open()
    assert compressed_path(project, "P", "tifany/motif.tif_1.tif").name == "motif.tif_1.png"


def test_tif_is_replaced_in_every_column(tiny):
    """A treatment called "motif" became "mo.png"."""
    index = read_index(tiny.open())
    assert "motif" in index.classes
    assert {site.row["pert_name"] for site in index.sites} == {"DMSO", "motif", "NA"}


@pytest.mark.parametrize("slash", ["", "/"])
def test_root_without_a_trailing_slash_loses_the_outlines(painting, example, slash):
    project = open_project(f"{example}{slash}", "export_mask5.json")
    assert all(site.outline is not None and site.outline.is_file() for site in read_index(project).sites)


@pytest.mark.parametrize("shape", [(1, 40, 50), (40, 50, 1), (40, 50)])
def test_outline_read_as_one_by_height_by_width(tmp_path, shape):
    tifffile.imwrite(tmp_path / "o.tif", np.full(shape, 255, np.uint8), photometric="minisblack")
    assert read_plane(tmp_path / "o.tif").shape == (40, 50)


def test_grey_stored_as_three_colours(tmp_path):
    grey = np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8)
    (tmp_path / "g.png").write_bytes(imagecodecs.png_encode(np.repeat(grey[..., None], 3, axis=2)))
    np.testing.assert_array_equal(read_plane(tmp_path / "g.png"), grey)
    (tmp_path / "c.png").write_bytes(imagecodecs.png_encode(np.stack([grey, grey, 255 - grey], axis=2)))
    with pytest.raises(CellsError, match="one file per channel"):
        read_plane(tmp_path / "c.png")


def test_images_are_held_as_float64(tiny):
    planes = read_channels([tiny.image()])
    assert planes[0].dtype == np.uint8
    assert take_crops(planes, np.array([[20.0, 20.0]]), 16).dtype == np.float32


def test_one_image_at_a_time_without_reading_ahead():
    taken = []

    def tasks():
        for number in range(50):
            taken.append(number)
            yield number

    answers = ordered_map(abs, tasks(), workers=2)
    assert next(answers) == 0
    assert len(taken) == 2 * AHEAD
    assert list(answers) == list(range(1, 50))


def test_width_and_height_are_fixed(tiny):
    tiny.config(**{"dataset.images.width": None, "dataset.images.height": None})
    for channel in ("DNA", "RNA", "Mito"):
        path = tiny.image(well="B02", channel=channel)
        path.write_bytes(encode_png(np.pad(read_plane(path), ((0, 7), (0, 13)))))
    assert export_cells(tiny.open()).problems == []


def test_a_truncated_npz_counts_as_done(tmp_path):
    path = tmp_path / "1.npz"
    np.savez_compressed(path, features=np.random.default_rng(0).random((9, 50)))
    assert is_whole_npz(path)
    data = path.read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        assert not is_whole_npz(path)


def test_type_of_x_is_list_is_always_true():
    raw = {"dataset": {"metadata": {"label_field": "t"}, "images": {"channels": "DNA"}}}
    with pytest.raises(ConfigError, match="must be a list of texts"):
        check_config(raw)


@pytest.mark.parametrize("epochs", [1, 2, 4, 5, 6])
def test_cosine_needs_five_epochs(epochs):
    raw = {"dataset": {"metadata": {"label_field": "t"}, "images": {"channels": ["A"]}}}
    raw["train"] = {"model": {"epochs": epochs, "lr_schedule": "cosine"}}
    config = check_config(raw)
    rates = [learning_rate(config, epoch, ()) for epoch in range(epochs)]
    assert all(rate > 0 for rate in rates)
    assert max(rates) == config["train.model.params.learning_rate"]


def test_split_and_parts_ignore_the_name_of_the_table(tiny):
    shutil.copy(tiny.index_path, tiny.index_path.with_name("screen.csv"))
    tiny.index_path.unlink()
    project = tiny.open(index_name="screen.csv")
    written = split_index(project, 2)
    assert [path.name for path in written] == ["screen-000.csv", "screen-001.csv"]
    assert export_cells(project, part=1).crops


def test_missing_locations_are_silent(tiny):
    tiny.locations().unlink()
    assert export_cells(tiny.open()).no_locations == ["P1/A01/1"]
    assert not check_project(tiny.open(), crops=False).healthy


def test_validation_crops_are_drawn_at_random(tiny):
    export_cells(tiny.open())
    one, other = (CropSet(tiny.open().config, tiny.open().crops).validation for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert len(one) == sum(len(read_locations(s.locations)) for s in read_index(tiny.open()).having([1]))


def test_further_targets_are_dropped_in_silence():
    raw = {"dataset": {"images": {"channels": ["A"]}}, "train": {"partition": {"targets": ["drug", "dose"]}}}
    assert "train.partition.targets: only drug is predicted, not dose" in check_config(raw).notes


def test_cells_at_one_place_overwrite_each_other(tiny):
    tiny.locations().write_text("Nuclei_Location_Center_X,Nuclei_Location_Center_Y\n30,30\n40,40\n30,30\n")
    project = tiny.open()
    report = export_cells(project)
    rows = [row for row in CropReader(project.crops).rows if row["Key"] == "P1/A01/1"]
    assert [row["index"] for row in rows] == ["0", "1"]
    assert report.doubles == 1
    found = check_project(project, crops=False).findings
    assert [(f.where, f.what) for f in found] == [("location", "duplicate")]


def test_samples_have_no_seed(tiny):
    tables = []
    for name in ("a", "b"):
        project = tiny.open(single_cells=name)
        export_cells(project, sample=True, factor=0.4, seed=7)
        tables.append((project.crops / "sc-metadata.csv").read_bytes())
    assert tables[0] == tables[1]


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_metadata_are_pickled_programs(tiny, tmp_path):
    """Features are read without opening the pickle beside them."""
    project = tiny.open()
    sprung = tmp_path / "sprung"
    assert pickle.dumps(Trap(sprung))
    for site in read_index(project).sites:
        path = npz_path(project, site)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, features=np.ones((2, 3), np.float32), metadata=np.array(Trap(sprung), dtype=object))
    assert aggregate_cells(project).rows == 6
    assert not sprung.exists()


def test_one_file_per_cell_swamps_a_file_system(tiny):
    project = tiny.open()
    report = export_cells(project, kind="shards")
    files = list(project.crops.rglob("*"))
    assert report.crops > 20 * len(files)


def test_masked_strips_crash_without_outlines(tiny):
    tiny.config(**{"prepare.outlines": "yes"})
    (tiny.root / "inputs/metadata/outlines.csv").write_text(
        "Outlines,Metadata_Plate,Metadata_Well,Metadata_Site\nx.png,P9,Z,1\n"
    )
    project = tiny.open()
    site = read_index(project).sites[0]
    with pytest.raises(CellsError, match=r"outlines\.csv has no row for P1/A01/1"):
        cut_strips(project.config, site, read_channels(site.images), np.array([[5.0, 5.0]]))


def test_flat_crops_become_nan(tiny):
    for channel in ("DNA", "RNA", "Mito"):
        tiny.image(channel=channel).write_bytes(encode_png(np.full((90, 110), 50, np.uint8)))
    project = tiny.open()
    export_cells(project)
    report = check_project(project, inputs=False)
    assert {finding.what for finding in report.findings} == {"black"}
    assert all(finding.name.startswith("P1/A01/1/") for finding in report.findings)
