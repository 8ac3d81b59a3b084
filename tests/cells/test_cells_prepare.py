"""Plates are evened out and brought to 8 bits; what cannot be is refused or told by name."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.transform
import tifffile

from marten.cells.errors import CellsError
from marten.cells.images import read_plane
from marten.cells.index import read_index
from marten.cells.prepare import compress_plane, illumination_function, percentile_of, prepare_images
from marten.cells.project import open_project

LIT = 1 + 0.8 * np.linspace(0, 1, 110)[None, :] * np.ones((90, 1))


@pytest.fixture
def raw(tiny):
    """The tiny project with raw 16-bit images of one plate, lit twice as brightly on the right."""
    rng = np.random.default_rng(1)
    tiny.write_rows([row for row in tiny.rows() if row["Metadata_Plate"] == "P1"])
    tiny.config(**{"prepare.illumination_correction": {"down_scale_factor": 2, "median_filter_size": 8}})
    for row in tiny.rows():
        for channel in ("DNA", "RNA", "Mito"):
            path = tiny.root / "inputs/images" / row[channel]
            path.parent.mkdir(parents=True, exist_ok=True)
            scene = rng.gamma(2.0, 400, (90, 110)) + 500
            tifffile.imwrite(path, np.minimum(scene * LIT, 65535).astype(np.uint16), compression="zlib")
            tiny.image(row["Metadata_Plate"], row["Metadata_Well"], row["Metadata_Site"], channel).unlink()
    return tiny


def test_uneven_light_is_found_and_divided_out(raw):
    project = raw.open()
    report = prepare_images(project)
    assert (report.written, report.problems) == (18, [])
    stored = np.load(project.intensities / "P1/P1.npz", allow_pickle=False)
    lit = stored["illum_correction_function"][:, :, 0]
    assert lit.min() == 1
    assert lit[:, -20:].mean() / lit[:, :20].mean() == pytest.approx(LIT[:, -20:].mean() / LIT[:, :20].mean(), rel=0.12)
    after = np.mean([read_plane(raw.image(well=w, site=s)) for w in ("A01", "B02", "C-3") for s in "12"], axis=0)
    assert after[:, -30:].mean() / after[:, :30].mean() == pytest.approx(1, abs=0.1)
    assert stored["controls_distribution"].sum() == 2 * 3 * 90 * 110


def test_any_number_of_processes_gives_the_same_bytes(raw):
    project = raw.open()
    prepare_images(project, workers=1)
    first = {path: path.read_bytes() for path in project.compressed_images.rglob("P1/*.png")}
    prepare_images(project, workers=2, overwrite=True)
    assert first
    assert all(path.read_bytes() == data for path, data in first.items())


def test_only_what_is_missing_or_made_otherwise_is_done_again(raw):
    prepare_images(raw.open())
    raw.image().unlink()
    again = prepare_images(raw.open())
    assert (again.written, again.present) == (3, 15)
    raw.config(**{"prepare.compression.scaling_factor": 0.5})
    halved = prepare_images(raw.open())
    assert halved.written == 18
    assert read_plane(raw.image()).shape == (45, 55)


def test_plates_of_mixed_sizes_are_refused(raw):
    raw.config(**{"dataset.images.width": None, "dataset.images.height": None})
    for channel in ("DNA", "RNA", "Mito"):
        tifffile.imwrite(raw.root / f"inputs/images/P1/B02_s1_{channel}.tif", np.ones((80, 110), np.uint16))
    with pytest.raises(CellsError, match=r"plate P1: the images of P1/B02/1 are 110 x 80 pixels"):
        prepare_images(raw.open())


def test_two_images_for_one_output_are_refused(raw):
    rows = raw.rows()
    rows[1]["DNA"] = "other/A01_s1_DNA.tif"
    raw.write_rows(rows)
    with pytest.raises(CellsError, match=r"P1/A01/1 and P1/A01/2 would both be written"):
        prepare_images(raw.open())


def test_damaged_and_too_deep_images_are_told_and_the_rest_is_done(raw):
    damaged = raw.root / "inputs/images/P1/A01_s1_DNA.tif"
    damaged.write_bytes(damaged.read_bytes()[:200])
    report = prepare_images(raw.open())
    assert report.written == 15
    assert len(report.problems) == 1
    assert "A01_s1_DNA.tif is damaged" in report.problems[0]
    raw.config(**{"dataset.images.bits": 8})
    with pytest.raises(CellsError, match="not one of its 6 sites can be read"):
        prepare_images(raw.open())


def test_a_black_channel_stays_black():
    lit = illumination_function(np.zeros((20, 20)), (40, 40), 8)
    assert (lit == 1).all()
    assert not compress_plane(np.zeros((40, 40), np.uint16), lit, 0.0, (40, 40)).any()


def test_percentiles_of_a_histogram():
    histogram = np.zeros(16, np.int64)
    histogram[3], histogram[9] = 99, 1
    assert (percentile_of(histogram, 0.5), percentile_of(histogram, 0.995)) == (3, 9)
    assert percentile_of(np.zeros(4, np.int64), 0.5) == 0


def test_real_16_bit_lzw_images_of_a_plate(painting, tmp_path):
    (tmp_path / "inputs").symlink_to(painting / "nf1_schwann_16bit/inputs")
    project = open_project(tmp_path, "config.json")
    report = prepare_images(project, workers=1)
    assert (report.plates, report.written, report.problems) == (1, 15, [])
    stored = np.load(project.intensities / "Plate_2/Plate_2.npz", allow_pickle=False)
    site = read_index(project, raw_images=True).sites[1]
    plane = read_plane(site.images[2])
    assert (plane.shape, plane.dtype) == ((904, 1224), np.uint16)
    lit = stored["illum_correction_function"][:, :, 2]
    image = skimage.transform.resize(plane / lit, plane.shape, mode="reflect", anti_aliasing=True)
    low, high = np.percentile(image, (0.05, 99.95))
    expected = (np.clip(image, low, high) - low) / (high - low) * 255
    found = read_plane(read_index(project).sites[1].images[2])
    assert np.abs(found - expected).max() <= 0.51
