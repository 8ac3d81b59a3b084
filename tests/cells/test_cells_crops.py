"""Crops equal DeepProfiler's, to a grey level, and its masks exactly."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marten.cells.crops import from_strips, label_regions, normalise, take_crops, take_masks, to_strips
from marten.cells.errors import CellsError
from marten.cells.export import cut_strips
from marten.cells.images import read_channels
from marten.cells.index import read_index
from marten.cells.locations import location_text, site_centres
from marten.cells.project import open_project


@pytest.mark.parametrize(
    ("folder", "config", "least"), [("crops_nomask", "base5.json", 7), ("crops_mask", "export_mask5.json", 20)]
)
def test_strips_equal_those_that_deepprofiler_exported(painting, folder, config, least):
    project = open_project(painting / "bbbc037_deepprofiler_example", config)
    index = read_index(project)
    compared, differing = 0, 0
    for site in index.sites:
        references = sorted((painting / "reference" / folder / site.key).glob("*.png"))
        if not references:
            continue
        planes = read_channels(site.images)
        centres = site_centres(project.config, site, planes[0].shape)
        names = [f"{index.class_of(site)}@{location_text(x)}x{location_text(y)}.png" for x, y in centres]
        strips = cut_strips(project.config, site, planes, centres)
        for path in references:
            expected = imagecodecs.imread(path)
            found = strips[names.index(path.name)]
            assert found.shape == expected.shape
            difference = np.abs(expected.astype(int) - found)
            assert difference.max() <= 1, path
            assert not difference[:, 5 * 128 :].any(), f"{path}: the mask differs"
            differing += int((difference > 0).sum())
            compared += 1
    assert compared >= least
    assert differing <= 10


def naive(plane, x, y, box):
    """One crop by the formula, sample by sample."""
    height, width = plane.shape
    out = np.zeros((box, box))
    for i in range(box):
        for j in range(box):
            at_y = (y - box / 2) / height * (height - 1) + i * (box / height) * (height - 1) / (box - 1)
            at_x = (x - box / 2) / width * (width - 1) + j * (box / width) * (width - 1) / (box - 1)
            if not (0 <= at_y <= height - 1 and 0 <= at_x <= width - 1):
                continue
            y0, x0 = int(at_y), int(at_x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            dy, dx = at_y - y0, at_x - x0
            top = plane[y0, x0] * (1 - dx) + plane[y0, x1] * dx
            out[i, j] = top * (1 - dy) + (plane[y1, x0] * (1 - dx) + plane[y1, x1] * dx) * dy
    return out


@settings(max_examples=40, deadline=None)
@given(x=st.integers(-12, 52), y=st.integers(-12, 42), box=st.sampled_from([5, 8, 16]), seed=st.integers(0, 9))
def test_any_centre_is_sampled_by_the_formula(x, y, box, seed):
    plane = np.random.default_rng(seed).integers(0, 65536, (31, 43)).astype(np.uint16)
    crop = take_crops([plane], np.array([[x, y]], float), box)[0, 0]
    expected = naive(plane, x, y, box)
    # a sample that falls on the rim itself is inside or outside by a rounding error
    rim = (crop == 0) != (expected == 0)
    assert rim.sum() <= 2 * box
    np.testing.assert_allclose(crop[~rim], expected[~rim], atol=2.0)


def test_slice_mode_is_the_slice_of_pixels_with_zeros_around():
    plane = np.arange(1, 31 * 43 + 1).reshape(31, 43)
    crop = take_crops([plane], np.array([[20.0, 15.0], [0.0, 0.0], [900.0, 5.0]]), 8, geometry="slice")[:, 0]
    np.testing.assert_array_equal(crop[0], plane[11:19, 16:24])
    np.testing.assert_array_equal(crop[1, 4:, 4:], plane[:4, :4])
    assert crop[1].sum() == plane[:4, :4].sum()
    assert not crop[2].any()
    with pytest.raises(CellsError, match="no crop geometry 'fast'"):
        take_crops([plane], np.zeros((1, 2)), 8, geometry="fast")


def test_both_geometries_show_the_same_place():
    yy, xx = np.mgrid[:200, :200]
    plane = (xx + 2 * yy).astype(float)
    centres = np.array([[100.0, 100.0]])
    exact, quick = (take_crops([plane], centres, 32, geometry=g)[0, 0] for g in ("parity", "slice"))
    assert np.abs(exact - quick).max() < 3


def test_channels_are_stretched_one_by_one_and_a_flat_one_becomes_black():
    crops = np.random.default_rng(0).uniform(5, 900, (3, 2, 8, 8)).astype(np.float32)
    crops[1, 0] = 77
    done = normalise(crops)
    assert done[0].min() == 0
    assert done[0, 1].max() == pytest.approx(1)
    assert not done[1, 0].any()
    assert np.isfinite(done).all()


def test_masks_keep_only_the_cell_in_the_middle():
    outline = np.zeros((60, 60), np.uint8)
    outline[20:41, 20] = outline[20:41, 40] = outline[20, 20:41] = outline[40, 20:41] = 255
    mask = take_masks(label_regions(outline), np.array([[30.0, 30.0]]), 32, geometry="slice")[0]
    assert mask.sum() == 19 * 19
    assert mask[16, 16]
    assert not mask[0, 0]


@settings(max_examples=25, deadline=None)
@given(cells=st.integers(1, 3), channels=st.integers(1, 4), masked=st.booleans(), seed=st.integers(0, 99))
def test_strips_fold_back(cells, channels, masked, seed):
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, (cells, channels, 6, 6)).astype(np.uint8)
    levels[:, :, 0, 0] = 255
    masks = rng.random((cells, 6, 6)) > 0.5 if masked else None
    strips = to_strips(levels.astype(np.float32) / 255 + np.float32(1e-4) * (levels < 255), masks)
    back = from_strips(strips, channels, masked=masked) * 255
    expected = levels * (1 if masks is None else masks[:, None])
    assert np.abs(np.round(back) - expected).max() <= 1
    with pytest.raises(CellsError, match="does not hold"):
        from_strips(strips, channels + 2)
