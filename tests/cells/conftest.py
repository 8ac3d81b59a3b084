"""A tiny made project for logic, and the real DeepProfiler example for what matters."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

LACKING = [name for name in ("pandas", "pyarrow", "imagecodecs", "copairs", "h5py") if find_spec(name) is None]
if LACKING:
    collect_ignore_glob = ["test_*.py"]
else:
    from marten.cells.images import encode_png
    from marten.cells.project import Project, open_project


def pytest_report_header(config):
    return [f"tests/cells left out, {LACKING[0]} is missing: pip install -r requirements-cells.txt"] if LACKING else []


CHANNELS = ("DNA", "RNA", "Mito")
HEIGHT, WIDTH = 90, 110


@dataclass
class Tiny:
    """A project of 2 plates x 3 wells x 2 sites, 3 channels of 90 x 110 pixels, box 16, about 6 cells a site."""

    root: Path

    @property
    def config_path(self) -> Path:
        return self.root / "inputs/config/config.json"

    @property
    def index_path(self) -> Path:
        return self.root / "inputs/metadata/index.csv"

    def config(self, **changes) -> None:
        """Change the configuration by dotted keys; a value of ... takes the key out."""
        raw = json.loads(self.config_path.read_text())
        for key, value in changes.items():
            *groups, name = key.split(".")
            node = raw
            for group in groups:
                node = node.setdefault(group, {})
            if value is ...:
                node.pop(name)
            else:
                node[name] = value
        self.config_path.write_text(json.dumps(raw))

    def rows(self) -> list[dict[str, str]]:
        with open(self.index_path, newline="") as file:
            return list(csv.DictReader(file))

    def write_rows(self, rows) -> None:
        with open(self.index_path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def locations(self, plate="P1", well="A01", site="1") -> Path:
        return self.root / f"inputs/locations/{plate}/{well}-{site}-Nuclei.csv"

    def image(self, plate="P1", well="A01", site="1", channel="DNA") -> Path:
        return self.root / f"outputs/compressed/images/{plate}/{well}_s{site}_{channel}.png"

    def open(self, **kwargs) -> Project:
        return open_project(self.root, "config.json", **kwargs)


CONFIG = {
    "dataset": {
        "metadata": {"label_field": "pert_name", "control_value": "DMSO"},
        "images": {"channels": list(CHANNELS), "file_format": "tif", "bits": 16, "width": WIDTH, "height": HEIGHT},
        "locations": {"mode": "single_cells", "box_size": 16, "mask_objects": False},
    },
    "prepare": {"compression": {"implement": True}},
    "train": {
        "partition": {"targets": ["pert_name"], "split_field": "Split", "training": [0], "validation": [1]},
        "model": {"name": "cnn", "epochs": 1, "initialization": "Random", "params": {"conv_blocks": 2}},
    },
    "profile": {"feature_layer": "features", "checkpoint": "best", "batch_size": 8},
}


def build_tiny(root: Path) -> Tiny:
    rng = np.random.default_rng(0)
    for folder in ("inputs/config", "inputs/metadata", "inputs/locations", "outputs/compressed/images"):
        (root / folder).mkdir(parents=True)
    rows = []
    for split, plate in enumerate(("P1", "P2")):
        (root / "outputs/compressed/images" / plate).mkdir()
        (root / "inputs/locations" / plate).mkdir()
        for well, treatment in (("A01", "DMSO"), ("B02", "motif"), ("C-3", "NA")):
            for site in ("1", "2"):
                row = {"Metadata_Plate": plate, "Metadata_Well": well, "Metadata_Site": site}
                for channel in CHANNELS:
                    row[channel] = f"{plate}/{well}_s{site}_{channel}.tif"
                    path = root / "outputs/compressed/images" / plate / f"{well}_s{site}_{channel}.png"
                    path.write_bytes(encode_png(rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)))
                rows.append({**row, "pert_name": treatment, "pert_name_replicate": "1", "Split": str(split)})
                count = int(rng.integers(4, 9))
                centres = rng.permutation([(x, y) for x in range(2, WIDTH, 9) for y in range(3, HEIGHT, 9)])[:count]
                text = "".join(f"{x},{y}\n" for x, y in centres)
                path = root / f"inputs/locations/{plate}/{well}-{site}-Nuclei.csv"
                path.write_text("Nuclei_Location_Center_X,Nuclei_Location_Center_Y\n" + text)
    tiny = Tiny(root)
    tiny.config_path.write_text(json.dumps(CONFIG))
    tiny.write_rows(rows)
    return tiny


@pytest.fixture(scope="session")
def tiny_template(tmp_path_factory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny") / "project").root


@pytest.fixture
def tiny(tiny_template, tmp_path) -> Tiny:
    root = tmp_path / "project"
    shutil.copytree(tiny_template, root)
    return Tiny(root)


@pytest.fixture(scope="session")
def painting() -> Path:
    """The folder of real microscopy."""
    told = os.environ.get("MARTEN_DATA", "")
    folder = Path(told) / "cell-painting"
    if not told or not folder.is_dir():
        pytest.skip("MARTEN_DATA names no folder with cell-painting in it")
    return folder


@pytest.fixture
def example(painting, tmp_path) -> Path:
    """DeepProfiler's example project with room for outputs."""
    source = painting / "bbbc037_deepprofiler_example"
    root = tmp_path / "example"
    (root / "outputs").mkdir(parents=True)
    (root / "inputs").symlink_to(source / "inputs")
    (root / "outputs" / "compressed").symlink_to(source / "outputs" / "compressed")
    return root
