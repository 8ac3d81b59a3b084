"""The table of sites and the files of locations are checked at the door."""

from __future__ import annotations

import numpy as np
import pytest

from marten.cells.errors import CellsError
from marten.cells.index import compressed_path, read_index, split_index
from marten.cells.locations import as_stored, grid_centres, read_locations


def test_rows_become_sites_with_their_files(tiny):
    index = read_index(tiny.open())
    assert len(index.sites) == 12
    assert index.classes == ("DMSO", "NA", "motif")
    site = index.sites[4]
    assert (site.key, site.row["Metadata_Site"], site.row["pert_name"]) == ("P1/C-3/1", 1, "NA")
    assert site.locations == tiny.locations(well="C-3")
    assert site.images[0] == tiny.image(well="C-3")
    assert all(path.is_file() for each in index.sites for path in (*each.images, each.locations))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: [row.pop("RNA") for row in rows], "lacks the column 'RNA'"),
        (lambda rows: [row.pop("pert_name") for row in rows], "lacks the column 'pert_name'"),
        (lambda rows: rows[2].update(DNA=""), "row 4: DNA is empty"),
        (lambda rows: rows[1].update(Metadata_Site="1"), "rows 2 and 3 are both site P1/A01/1"),
        (lambda rows: rows[0].update(Metadata_Well="A/1"), "cannot name a folder"),
        (lambda rows: rows[0].update(Metadata_Plate=".."), "cannot name a folder"),
    ],
)
def test_a_bad_table_is_refused_by_row_and_column(tiny, change, told):
    rows = tiny.rows()
    change(rows)
    tiny.write_rows(rows)
    with pytest.raises(CellsError, match=told):
        read_index(tiny.open())


def test_tables_that_are_no_tables(tiny):
    text = tiny.index_path.read_text()
    for broken, told in (
        ("", "is empty"),
        (text + "P1,A01\n", "2 values for"),
        (text.splitlines()[0] + "\n", "no rows"),
    ):
        tiny.index_path.write_text(broken)
        with pytest.raises(CellsError, match=told):
            read_index(tiny.open())
    tiny.index_path.write_bytes(b"Metadata_Plate\n\xff\xfe\n")
    with pytest.raises(CellsError, match="UTF-8"):
        read_index(tiny.open())
    tiny.index_path.unlink()
    with pytest.raises(CellsError, match="no table at"):
        read_index(tiny.open())


def test_wrong_split_values_list_what_the_table_holds(tiny):
    index = read_index(tiny.open())
    assert len(index.having([0.0])) == len(index.having(["0"])) == 6
    with pytest.raises(CellsError, match=r"it holds \{'0': 6, '1': 6\}"):
        index.having(["Training"])


def test_leading_zeros_stay(tiny):
    rows = tiny.rows()
    for row in rows:
        row["pert_name_replicate"] = "007"
    tiny.write_rows(rows)
    assert read_index(tiny.open()).sites[0].row["pert_name_replicate"] == "007"


def test_parts_hold_whole_wells_and_every_site_once(tiny):
    project = tiny.open()
    written = split_index(project, 4)
    assert [path.name for path in written] == ["index-000.csv", "index-001.csv", "index-002.csv", "index-003.csv"]
    parts = [read_index(project, part) for part in range(4)]
    assert sorted(s.key for p in parts for s in p.sites) == sorted(s.key for s in read_index(project).sites)
    wells = [{(s.plate, s.well) for s in p.sites} for p in parts]
    assert sum(len(w) for w in wells) == len(set.union(*wells)) == 6
    assert {p.classes for p in parts} == {("DMSO", "NA", "motif")}
    assert len(split_index(project, 9)) == 9
    assert sorted(len(read_index(project, part).sites) for part in range(9)) == [0, 0, 0, 2, 2, 2, 2, 2, 2]
    with pytest.raises(CellsError, match="at least 1"):
        split_index(project, 0)


@pytest.mark.parametrize(
    ("line", "told"),
    [("nan,4", "take that cell out"), ("x,4", "two numbers"), ("5", "two numbers"), ("inf,1", "centre")],
)
def test_a_location_that_is_no_place_is_refused_by_row(tmp_path, line, told):
    path = tmp_path / "A01-1-Nuclei.csv"
    path.write_text(f"Nuclei_Location_Center_X,Nuclei_Location_Center_Y\n1,2\n{line}\n")
    with pytest.raises(CellsError, match=f"row 3: .*{told}"):
        read_locations(path)


def test_locations_keep_order_and_ignore_other_columns(tmp_path):
    path = tmp_path / "A01-1-Nuclei.csv"
    path.write_text("Nuclei_Location_Center_Y,Area,Nuclei_Location_Center_X\n1,9,2\n3,9,4\n")
    np.testing.assert_array_equal(read_locations(path), [[2, 1], [4, 3]])
    assert as_stored(read_locations(path)).dtype == np.int64
    path.write_text("Nuclei_Location_Center_Y\n1\n")
    with pytest.raises(CellsError, match="lacks the column Nuclei_Location_Center_X"):
        read_locations(path)
    assert read_locations(tmp_path / "none.csv") is None


def test_a_full_image_is_covered_by_a_grid():
    np.testing.assert_array_equal(grid_centres((100, 100), 100), [[50, 50]])
    np.testing.assert_array_equal(grid_centres((100, 200), 100), [[50, 50], [150, 50]])
    assert len(grid_centres((1080, 1080), 512)) == 9


def test_only_the_true_extension_is_exchanged(tiny):
    project = tiny.open()
    assert compressed_path(project, "P", "a/tif.motif.tif").name == "tif.motif.png"
    assert compressed_path(project, "P", "a\\b.TIFF").name == "b.png"
    assert compressed_path(project, "P", "no_extension.v2").name == "no_extension.v2.png"
