"""Exports: every cell or a balanced sample, as a PNG tree or in shards, the same from any number of processes."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest

from marten.cells.errors import CellsError
from marten.cells.export import export_cells, sample_sites
from marten.cells.index import read_index
from marten.cells.locations import read_locations
from marten.cells.store import CropReader
from marten.files import ROOT


def table(project):
    with open(project.crops / "sc-metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def cells(*words):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/cells"), *map(str, words)], capture_output=True, text=True, check=False
    )


def test_every_cell_is_written_under_deepprofilers_names(tiny):
    project = tiny.open()
    report = export_cells(project)
    rows = table(project)
    assert report.crops == len(rows) == sum(len(read_locations(s.locations)) for s in read_index(project).sites)
    assert list(rows[0]) == [
        "index",
        "Nuclei_Location_Center_X",
        "Nuclei_Location_Center_Y",
        "Key",
        "Target",
        "pert_name",
        "Split",
        "Image_Name",
    ]
    first = rows[0]
    x, y = first["Nuclei_Location_Center_X"], first["Nuclei_Location_Center_Y"]
    assert first["Image_Name"] == f"P1/A01/1/0@{x}x{y}.png"
    assert all((project.crops / row["Image_Name"]).is_file() for row in rows)


def test_shards_hold_the_same_pixels_in_few_files(tiny):
    tree, shards = tiny.open(), tiny.open(single_cells="shards")
    export_cells(tree)
    export_cells(shards, kind="shards")
    one, other = CropReader(tree.crops), CropReader(shards.crops)
    assert len(one) == len(other)
    for number in range(len(one)):
        np.testing.assert_array_equal(one.read(number), other.read(number))
    assert len(list(shards.crops.iterdir())) == 3


def test_a_damaged_shard_is_told_by_the_crops_name(tiny):
    project = tiny.open()
    export_cells(project, kind="shards")
    shard = project.crops / "crops-00000.shard"
    data = bytearray(shard.read_bytes())
    data[10] ^= 255
    shard.write_bytes(data)
    with pytest.raises(CellsError, match=r"P1/A01/1/0@.*damaged"):
        CropReader(project.crops).read(0)


def test_the_example_is_exported_whole_by_two_processes_as_by_one(example, painting):
    words = ("--root", f"{example}/", "--config", "base5.json")
    told = cells(*words, "export", "--workers", 2)
    assert told.returncode == 0, told.stderr
    assert "1877 crops of 24 sites" in told.stdout
    told = cells(*words, "--single-cells", "one", "export-sc", "--workers", 1)
    assert told.returncode == 0, told.stderr
    first, second = (example / "outputs" / name / "sc-metadata.csv" for name in ("single-cells", "one"))
    assert first.read_bytes() == second.read_bytes()
    ours = first.read_text().splitlines()
    theirs = (painting / "reference/crops_nomask/sc-metadata.csv").read_text().splitlines()
    available = {"41744/f21/1", "41744/f21/2", "41744/f21/3"}
    assert ours[0] == theirs[0]
    picked = [line for line in theirs[1:] if line.split(",")[3] in available]
    assert len(picked) > 200
    assert [line for line in ours[1:] if line.split(",")[3] in available] == picked


def test_a_sample_takes_training_sites_of_every_class_equally(tiny):
    project = tiny.open()
    index = read_index(project)
    chosen = sample_sites(project.config, index, 0.5, seed=1)
    assert all(site.plate == "P1" for site, _ in chosen)
    export_cells(project, sample=True, factor=0.5, seed=1)
    rows = table(project)
    counts = {label: sum(row["pert_name"] == label for row in rows) for label in index.classes}
    median = np.median([len(read_locations(s.locations)) for s in index.having([0])])
    assert set(counts.values()) == {2 * int(median * 0.5)}


def test_a_smaller_class_gives_more_cells_of_its_sites(tiny):
    rows = [row for row in tiny.rows() if not (row["pert_name"] == "NA" and row["Metadata_Site"] == "2")]
    tiny.write_rows(rows)
    project = tiny.open()
    chosen = sample_sites(project.config, read_index(project), 0.5, seed=0)
    take = {site.key: count for site, count in chosen}
    assert take["P1/C-3/1"] == 2 * take["P1/A01/1"]


def test_samples_are_seeded_whatever_the_number_of_processes(tiny):
    outcomes = []
    for name, seed, workers in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        project = tiny.open(single_cells=name)
        export_cells(project, sample=True, factor=0.5, seed=seed, workers=workers)
        outcomes.append((project.crops / "sc-metadata.csv").read_text())
    assert outcomes[0] == outcomes[1] != outcomes[2]


def test_what_is_there_is_not_overwritten_unasked(tiny):
    project = tiny.open()
    export_cells(project)
    with pytest.raises(CellsError, match="already holds crops"):
        export_cells(project)
    assert export_cells(project, overwrite=True).crops


def test_a_site_that_cannot_be_read_is_told_and_the_rest_is_written(tiny):
    tiny.image(well="B02", site="2").write_bytes(tiny.image(well="B02", site="2").read_bytes()[:300])
    tiny.image(well="C-3", channel="RNA").unlink()
    tiny.locations(site="2").unlink()
    tiny.locations(plate="P2").write_text("Nuclei_Location_Center_X,Nuclei_Location_Center_Y\n")
    report = export_cells(tiny.open())
    assert [problem.split(":")[0] for problem in report.problems] == ["P1/B02/2", "P1/C-3/1"]
    assert "truncated PNG" in report.problems[0]
    assert report.no_locations == ["P1/A01/2"]
    assert report.empty == ["P2/A01/1"]
    told = cells("--root", tiny.root, "export", "--overwrite", "--workers", 1)
    assert told.returncode == 1
    assert "failed: P1/B02/2" in told.stdout


def test_images_of_another_size_are_refused(tiny):
    tiny.config(**{"dataset.images.width": 111})
    with pytest.raises(CellsError, match=r"width 110, but dataset\.images\.width is 111"):
        export_cells(tiny.open())


def test_a_full_image_project_needs_no_locations(tiny):
    tiny.config(
        **{
            "dataset.locations.mode": "full_image",
            "dataset.locations.view_size": 55,
            "prepare.compression.implement": True,
        }
    )
    for path in (tiny.root / "inputs/locations").rglob("*.csv"):
        path.unlink()
    report = export_cells(tiny.open())
    assert report.crops == 12 * 4
    assert CropReader(tiny.open().crops).read(0).shape == (16, 48)


def test_a_missing_library_or_verb_is_told_plainly(tmp_path):
    told = cells("--root", tmp_path / "none", "check")
    assert told.returncode == 1
    assert "no project at" in told.stderr
    assert cells("--help").returncode == 0
    assert cells("dance").returncode == 2
