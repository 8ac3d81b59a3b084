"""Wells are aggregated as pycytominer does it, out of .npz files or tables, and nothing is lost in silence."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

from marten.cells.aggregation import aggregate_cells
from marten.cells.errors import CellsError
from marten.cells.feature_files import npz_path, site_metadata, write_npz
from marten.cells.index import read_index
from marten.cells.networks import Profiler
from marten.cells.tables import feature_columns, read_profiles


@pytest.fixture
def profiled(tiny):
    """The tiny project with made features of 7 numbers for 1 to 12 cells a site."""
    rng = np.random.default_rng(3)
    project = tiny.open()
    profiler = Profiler(None, "efficientnet", "pool5", "made")
    for site in read_index(project).sites:
        cells = int(rng.integers(1, 13))
        values = rng.normal(size=(cells, 7)).astype(np.float32)
        metadata = site_metadata(project, site, profiler)
        write_npz(npz_path(project, site), metadata, rng.integers(0, 90, (cells, 2)).astype(float), values)
    tiny.config(**{"train.model.name": "efficientnet"})
    return tiny


@pytest.mark.parametrize("operation", ["median", "mean"])
def test_wells_equal_those_of_pycytominer(profiled, operation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pycytominer.cyto_utils.DeepProfiler_processing import AggregateDeepProfiler, DeepProfilerData

        project = profiled.open()
        data = DeepProfilerData(str(project.index_path), str(project.features), filename_delimiter="/")
        aggregated = AggregateDeepProfiler(data, aggregate_operation=operation, aggregate_on="well")
        expected = aggregated.aggregate_deep()
    report = aggregate_cells(project, method=operation)
    found = read_profiles(report.path)
    assert report.rows == len(expected) == 6
    keys = ["Metadata_Plate", "Metadata_Well"]
    expected = expected.sort_values(keys).reset_index(drop=True)
    found = found.sort_values(keys).reset_index(drop=True)
    assert feature_columns(found) == [f"efficientnet_{i}" for i in range(7)]
    np.testing.assert_allclose(found[feature_columns(found)], expected[feature_columns(found)], atol=1e-6)


def test_every_site_counts_alike_when_asked(profiled):
    project = profiled.open()
    found = read_profiles(aggregate_cells(project, method="site-then-well").path)
    first = [np.load(project.features / f"P1/A01/{site}.npz")["features"] for site in (1, 2)]
    expected = np.mean([np.median(values, axis=0) for values in first], axis=0)
    np.testing.assert_allclose(found[feature_columns(found)].iloc[0], expected, atol=1e-6)
    assert found["Metadata_Object_Count"].iloc[0] == sum(map(len, first))


def test_metadata_is_kept_where_it_is_constant(profiled):
    table = read_profiles(aggregate_cells(profiled.open()).path)
    assert "Metadata_pert_name" in table
    assert "Metadata_Site" not in table
    assert not {"Metadata_DNA", "DNA"} & set(table)
    assert list(table["Metadata_pert_name"][:3]) == ["DMSO", "motif", "NA"]
    assert "Metadata_Site" in read_profiles(aggregate_cells(profiled.open(), "site").path)


def test_missing_and_damaged_features_are_told(profiled):
    project = profiled.open()
    (project.features / "P1/A01/1.npz").unlink()
    damaged = project.features / "P2/B02/2.npz"
    damaged.write_bytes(damaged.read_bytes()[:60])
    report = aggregate_cells(project)
    assert report.missing == ["P1/A01/1"]
    assert len(report.damaged) == 1
    assert "P2/B02/2.npz is damaged" in report.damaged[0]
    assert report.rows == 6


def test_features_of_two_networks_are_refused(profiled):
    project = profiled.open()
    for site in (1, 2):
        np.savez_compressed(project.features / f"P2/B02/{site}.npz", features=np.ones((2, 5), np.float32))
    with pytest.raises(CellsError, match=r"mixes the features of different networks: 7 features in .*, 5 in"):
        aggregate_cells(project)


def test_an_older_tree_of_features_is_read(profiled):
    project = profiled.open()
    expected = read_profiles(aggregate_cells(project).path)
    for path in list(project.features.rglob("*.npz")):
        path.rename(path.parent.with_name(f"{path.parent.name}_{path.name}"))
    pd.testing.assert_frame_equal(read_profiles(aggregate_cells(project).path), expected)


def test_no_features_and_unknown_words(tiny):
    project = tiny.open()
    with pytest.raises(CellsError, match="run scripts/cells profile"):
        aggregate_cells(project)
    with pytest.raises(CellsError, match="no method 'sum'"):
        aggregate_cells(project, method="sum")
    with pytest.raises(CellsError, match="no level 'plate'"):
        aggregate_cells(project, "plate")
