"""Locations come out of nuclei images and tables as another program's did."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from marten.cells.errors import CellsError
from marten.cells.find_cells import centres_of_mask, locations_from_masks, locations_from_table
from marten.cells.index import read_index
from marten.cells.locations import read_locations
from marten.cells.project import open_project


def test_real_nuclei_masks_give_the_known_centres(painting, tmp_path):
    source = painting / "nf1_schwann_16bit/inputs"
    shutil.copytree(source / "metadata", tmp_path / "inputs/metadata")
    shutil.copytree(source / "config", tmp_path / "inputs/config")
    project = open_project(tmp_path, "config.json")
    report = locations_from_masks(project, source / "nuclei_labels", "{plate}/{well}_*_{site}_DAPI_*.tiff")
    assert (report.sites, report.cells, report.missing) == (5, 132, [])
    for site in read_index(project).sites:
        known = read_locations(source / "locations" / site.plate / site.locations.name)
        found = read_locations(site.locations)
        assert len(found) == len(known)
        nearest = np.abs(found[:, None] - known[None]).max(axis=2).min(axis=1)
        assert nearest.max() <= 1


def test_label_images_and_black_and_white_ones():
    mask = np.zeros((30, 40), np.uint8)
    mask[2:12, 3:13] = mask[15:25, 20:30] = 255
    mask[28, 1] = 255
    np.testing.assert_array_equal(centres_of_mask(mask), [[7.5, 6.5], [24.5, 19.5]])
    touching = np.zeros((20, 20), np.uint16)
    touching[:, :10], touching[:, 10:] = 1, 2
    touching[0, 0] = 0
    assert len(centres_of_mask(touching)) == 2
    assert centres_of_mask(np.zeros((5, 5), np.uint8)).shape == (0, 2)


def test_a_table_of_cellprofiler(tiny):
    rows = ["Metadata_Plate,Metadata_Well,Metadata_Site,Location_Center_X,Location_Center_Y,Area"]
    rows += ["P1,A01,1,10.4,20.6,5", "P1,A01,1,30,40,5", "P2,C-3,2,7,8,5"]
    table = tiny.root / "Nuclei.csv"
    table.write_text("\n".join(rows) + "\n")
    report = locations_from_table(tiny.open(), table)
    assert (report.sites, report.cells, len(report.missing)) == (2, 3, 10)
    np.testing.assert_array_equal(read_locations(tiny.locations()), [[10, 21], [30, 40]])
    table.write_text("\n".join(rows).replace("30,40", "thirty,40"))
    with pytest.raises(CellsError, match="row 3"):
        locations_from_table(tiny.open(), table)
    with pytest.raises(CellsError, match="lacks the column cx"):
        locations_from_table(tiny.open(), table, ("cx", "cy"))
    table.write_text("Metadata_Plate,Area\nP1,5\n")
    with pytest.raises(CellsError, match="name its columns with --columns"):
        locations_from_table(tiny.open(), table)


def test_two_images_for_one_site_are_refused(tiny):
    folder = tiny.root / "masks"
    (folder / "P1").mkdir(parents=True)
    for name in ("A01-1a.png", "A01-1b.png"):
        shutil.copy(tiny.image(), folder / "P1" / name)
    with pytest.raises(CellsError, match="2 images in"):
        locations_from_masks(tiny.open(), folder, "{plate}/{well}-{site}*")
