"""The check finds every kind of damage, once, by name; and prunes it."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest

from marten.cells.crops import to_strips
from marten.cells.export import export_cells
from marten.cells.images import decode_png, encode_png
from marten.cells.store import CropReader
from marten.cells.validate import check_project
from marten.files import ROOT


def kinds(report):
    return {(finding.where, finding.what) for finding in report.findings}


def column(path):
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    return rows[0][0], [row[0] for row in rows[1:]]


def test_a_sound_project_is_healthy(tiny):
    export_cells(tiny.open())
    report = check_project(tiny.open())
    assert report.healthy
    assert (report.sites, report.cells) == (12, report.crops)
    assert column(tiny.root / "outputs/checks/missing_images.csv") == ("missing_images", [])


def test_damaged_crops_are_told_apart_listed_and_pruned(tiny):
    project = tiny.open()
    export_cells(project)
    rows = CropReader(project.crops).rows
    paths = [project.crops / row["Image_Name"] for row in rows]
    good = decode_png(paths[5].read_bytes())
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-20])
    paths[2].write_bytes(b"")
    paths[3].write_bytes(encode_png(good[:, :32]))
    paths[4].write_bytes(encode_png(np.zeros_like(good)))
    flat = good.copy()
    flat[:, 16:32] = 9
    paths[5].write_bytes(encode_png(flat))
    damaged = bytearray(paths[6].read_bytes())
    damaged[len(damaged) // 2] ^= 255
    paths[6].write_bytes(damaged)
    table = project.crops / "sc-metadata.csv"
    table.write_text(table.read_text() + table.read_text().splitlines()[9] + "\n")

    report = check_project(project, inputs=False, prune=True)
    found = {finding.name: finding.what for finding in report.findings}
    names = [row["Image_Name"] for row in rows]
    assert found == {
        names[0]: "missing",
        names[1]: "damaged",
        names[2]: "damaged",
        names[3]: "of a wrong shape",
        names[4]: "black",
        names[5]: "with a flat channel",
        names[6]: "damaged",
        names[8]: "duplicate",
    }
    assert column(project.crops / "missing_crops.csv") == ("missing_crops", [names[0]])
    assert column(project.crops / "zero_crops.csv") == ("zero_crops", [names[4]])
    assert report.pruned == 8
    assert report.healthy
    after = check_project(project, inputs=False)
    assert after.findings == []
    assert [row["Image_Name"] for row in CropReader(project.crops).rows] == names[7:]


def test_shards_are_checked_and_pruned_too(tiny):
    project = tiny.open()
    export_cells(project, kind="shards")
    names = [row["Image_Name"] for row in CropReader(project.crops).rows]
    shard = project.crops / "crops-00000.shard"
    data = bytearray(shard.read_bytes())
    data[5] ^= 255
    shard.write_bytes(data[:-10])
    report = check_project(project, inputs=False, prune=True)
    assert {f.name: f.what for f in report.findings} == {names[0]: "damaged", names[-1]: "damaged"}
    assert check_project(project, inputs=False).findings == []
    assert check_project(project, inputs=False).crops == len(names) - 2


def test_an_empty_mask_is_told(tiny):
    tiny.config(**{"prepare.outlines": "available", "dataset.locations.mask_objects": True})
    header = "Outlines,Metadata_Plate,Metadata_Well,Metadata_Site\n"
    lines = [f"o.png,{r['Metadata_Plate']},{r['Metadata_Well']},{r['Metadata_Site']}\n" for r in tiny.rows()]
    (tiny.root / "inputs/metadata/outlines.csv").write_text(header + "".join(lines))
    (tiny.root / "inputs/outlines").mkdir()
    outline = np.zeros((90, 110), np.uint8)
    outline[::10] = outline[:, ::10] = 255
    (tiny.root / "inputs/outlines/o.png").write_bytes(encode_png(outline))
    project = tiny.open()
    export_cells(project)
    rows = CropReader(project.crops).rows
    crops = np.random.default_rng(0).random((1, 3, 16, 16)).astype(np.float32)
    png = encode_png(to_strips(crops, np.zeros((1, 16, 16), bool))[0])
    (project.crops / rows[0]["Image_Name"]).write_bytes(png)
    report = check_project(project)
    assert [(f.name, f.what) for f in report.findings] == [(rows[0]["Image_Name"], "without a mask")]


def test_inputs_are_checked_before_any_crop(tiny):
    tiny.image().unlink()
    tiny.image(well="B02").write_bytes(b"")
    tiny.locations(plate="P2").unlink()
    tiny.locations(plate="P2", site="2").write_text("Nuclei_Location_Center_X,Nuclei_Location_Center_Y\nnan,1\n")
    tiny.locations(plate="P2", well="B02").write_text(
        "Nuclei_Location_Center_X,Nuclei_Location_Center_Y\n5,5\n5,5\n900,5\n"
    )
    tiny.locations(plate="P2", well="B02", site="2").write_text("Nuclei_Location_Center_X,Nuclei_Location_Center_Y\n")
    tiny.image(plate="P2", well="C-3").write_bytes(encode_png(np.zeros((80, 110), np.uint8)))
    report = check_project(tiny.open())
    assert kinds(report) == {
        ("image", "missing"),
        ("image", "unusable"),
        ("location", "missing"),
        ("location", "unusable"),
        ("location", "duplicate"),
        ("location", "outside"),
        ("location", "empty"),
    }
    assert not report.healthy
    assert column(tiny.root / "outputs/checks/missing_images.csv")[1] == [str(tiny.image())]
    title, listed = column(tiny.root / "outputs/checks/missing_locs.csv")
    assert (title, len(listed)) == ("missing_locs", 2)


@pytest.mark.parametrize(("prune", "code"), [(False, 1), (True, 0)])
def test_the_exit_code_says_whether_the_next_step_may_run(tiny, prune, code):
    project = tiny.open()
    export_cells(project)
    (project.crops / CropReader(project.crops).rows[0]["Image_Name"]).unlink()
    command = [sys.executable, str(ROOT / "scripts/cells"), "--root", str(tiny.root), "check", "--workers", "1"]
    told = subprocess.run([*command, *(["--prune"] if prune else [])], capture_output=True, text=True, check=False)
    assert told.returncode == code, told.stderr
    assert "crops missing: 1" in told.stdout
