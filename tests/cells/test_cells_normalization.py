"""Sphering makes controls uncorrelated; pycytominer's methods are pycytominer's; nothing is blown up."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

from marten.cells.errors import CellsError
from marten.cells.normalization import Sphering, normalize_profiles, select_features
from marten.cells.tables import feature_columns, feature_matrix, read_profiles, write_profiles


def make_table(rows=60, features=5, seed=0):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, features)) @ rng.normal(size=(features, features)) * 3 + 10
    table = pd.DataFrame(mixed, columns=[f"f_{i}" for i in range(features)])
    table.insert(0, "Metadata_Plate", np.repeat(["A", "B"], rows // 2))
    table.insert(1, "Metadata_pert", ["DMSO" if i % 3 == 0 else f"t{i % 3}" for i in range(rows)])
    return table


CONTROLS = ("pert", "DMSO")


def test_sphered_controls_are_uncorrelated_with_variance_one():
    done, _ = normalize_profiles(make_table(), controls=CONTROLS, regularisation=1e-9)
    controls = done[done["Metadata_pert"] == "DMSO"][feature_columns(done)].to_numpy()
    np.testing.assert_allclose(controls.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(controls.T @ controls / len(controls), np.eye(5), atol=1e-6)


def test_sphering_is_the_formula_also_with_fewer_controls_than_features():
    rng = np.random.default_rng(0)
    controls, others = rng.normal(size=(4, 30)), rng.normal(size=(7, 30))
    found = Sphering.fit(controls, 1e-3).apply(others)
    centred = controls - controls.mean(axis=0)
    s, v = np.linalg.eigh(centred.T @ centred / 4)
    expected = (others - controls.mean(axis=0)) @ (v @ np.diag(1 / np.sqrt(np.clip(s, 0, None) + 1e-3)) @ v.T)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("method", ["standardize", "robustize", "mad_robustize", "spherize"])
def test_other_methods_are_pycytominers(method):
    import pycytominer

    table = make_table()
    done, _ = normalize_profiles(table, method, controls=CONTROLS, per="Metadata_Plate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [
            pycytominer.normalize(
                part,
                features=feature_columns(table),
                meta_features=["Metadata_Plate", "Metadata_pert"],
                samples="Metadata_pert == 'DMSO'",
                method=method,
            )
            for _, part in table.groupby("Metadata_Plate")
        ]
    np.testing.assert_allclose(feature_matrix(done), feature_matrix(pd.concat(expected)), atol=1e-6)
    assert list(done["Metadata_pert"]) == list(table["Metadata_pert"])


def test_a_feature_without_spread_among_controls_is_left_out_not_blown_up():
    table = make_table()
    table.loc[table["Metadata_pert"] == "DMSO", "f_2"] = 7.0
    done, report = normalize_profiles(table, "mad_robustize", controls=CONTROLS)
    assert "f_2" not in done
    assert report.after == 4
    assert "without spread" in report.notes[0]
    assert np.abs(feature_matrix(done)).max() < 1e3


def test_controls_that_are_not_there_are_told_with_the_plate():
    table = make_table()
    table.loc[table["Metadata_Plate"] == "B", "Metadata_pert"] = "t1"
    with pytest.raises(CellsError, match="0 rows in Metadata_Plate B have Metadata_pert == 'DMSO'"):
        normalize_profiles(table, controls=CONTROLS, per="Metadata_Plate")
    with pytest.raises(CellsError, match="no column 'gene'"):
        normalize_profiles(table, controls=("gene", "x"))
    with pytest.raises(CellsError, match="no method 'whiten'"):
        normalize_profiles(table, "whiten")


def test_missing_values_are_told_by_row_and_column():
    table = make_table()
    table.loc[3, "f_1"] = np.nan
    with pytest.raises(CellsError, match="row 5 has no number for f_1"):
        normalize_profiles(table, controls=CONTROLS)


def test_places_in_the_image_are_never_features():
    table = make_table().assign(Nuclei_Location_Center_X=5, Metadata_Nuclei_Location_Center_Y=6, Location_Center_Z=1)
    assert feature_columns(table) == [f"f_{i}" for i in range(5)]
    done, _ = normalize_profiles(table, controls=CONTROLS)
    assert (done["Nuclei_Location_Center_X"] == 5).all()


def test_features_are_selected_by_pycytominer():
    table = make_table().assign(f_double=lambda t: t["f_0"] * 2 + 1, f_flat=1.0)
    done, report = select_features(table, ["variance_threshold", "correlation_threshold"])
    assert "f_flat" not in done
    assert ("f_double" in done) != ("f_0" in done)
    assert (report.before, report.after) == (7, len(feature_columns(done)))
    with pytest.raises(CellsError, match="no rule 'magic'"):
        select_features(table, ["magic"])


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_tables_survive_a_journey_to_disk(tmp_path, suffix):
    table = make_table().assign(Metadata_note=["NA", *[""] * 59])
    path = tmp_path / f"profiles{suffix}"
    write_profiles(path, table)
    back = read_profiles(path)
    np.testing.assert_array_equal(feature_matrix(back), feature_matrix(table))
    assert list(back["Metadata_note"][:2]) == ["NA", ""]


def test_tables_that_are_no_profiles(tmp_path):
    with pytest.raises(CellsError, match="no table of profiles"):
        read_profiles(tmp_path / "none.csv")
    path = tmp_path / "t.csv"
    path.write_text("Metadata_Plate\nA\n")
    with pytest.raises(CellsError, match="1 rows and 0 features"):
        read_profiles(path)
    path.write_text("Metadata_Plate,gene\nA,JUN\n")
    with pytest.raises(CellsError, match="'gene' holds text"):
        read_profiles(path)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(CellsError, match="cannot be read"):
        read_profiles(tmp_path / "t.parquet")
