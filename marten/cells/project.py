"""Where everything of a project lies: DeepProfiler's tree of inputs and outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from marten.cells.config import Config, check_config, example_config, json_schema, read_config
from marten.cells.errors import CellsError
from marten.files import write_text

INPUTS = ("config", "metadata", "images", "locations", "outlines")
_EXAMPLE_INDEX = "Metadata_Plate,Metadata_Well,Metadata_Site,DNA,RNA,ER,AGP,Mito,pert_name,pert_name_replicate,Split\n"


@dataclass(frozen=True)
class Project:
    """One project's tree. Every path here may be overridden by the "paths" object of the configuration.

    Attributes:
        root: folder that holds inputs/ and outputs/.
        config: what the configuration says.
        experiment: folder below outputs/ for checkpoints, logs and features.
        single_cells: folder below outputs/ for exported crops.
        index_name: file below inputs/metadata.
    """

    root: Path
    config: Config
    experiment: str = "results"
    single_cells: str = "single-cells"
    index_name: str = "index.csv"

    def _folder(self, name: str, default: Path) -> Path:
        told = self.config.paths.get(name)
        return self.root / told if told else default

    @property
    def inputs(self) -> Path:
        """What the user gives."""
        return self.root / "inputs"

    @property
    def outputs(self) -> Path:
        """What the steps write."""
        return self.root / "outputs"

    @property
    def metadata(self) -> Path:
        """Folder of index.csv and outlines.csv."""
        return self._folder("metadata", self.inputs / "metadata")

    @property
    def index_path(self) -> Path:
        """The table of sites."""
        return self.metadata / self.index_name

    @property
    def raw_images(self) -> Path:
        """Folder of the microscope's images."""
        return self._folder("images", self.inputs / "images")

    @property
    def compressed_images(self) -> Path:
        """Folder of the 8-bit images that `prepare` writes."""
        return self._folder("compressed_images", self.outputs / "compressed" / "images")

    @property
    def intensities(self) -> Path:
        """Folder of each plate's intensity statistics and illumination function."""
        return self._folder("intensities", self.outputs / "intensities")

    @property
    def locations(self) -> Path:
        """Folder of {Plate}/{Well}-{Site}-Nuclei.csv."""
        return self._folder("locations", self.inputs / "locations")

    @property
    def outlines(self) -> Path:
        """Folder of outline images."""
        return self.inputs / "outlines"

    @property
    def crops(self) -> Path:
        """Folder of exported single cells."""
        return self._folder("single_cell_set", self.outputs / self.single_cells)

    @property
    def results(self) -> Path:
        """Folder of this experiment."""
        return self._folder("results", self.outputs / self.experiment)

    @property
    def checkpoints(self) -> Path:
        """Folder of this experiment's weights."""
        return self._folder("checkpoints", self.results / "checkpoint")

    @property
    def logs(self) -> Path:
        """Folder of this experiment's training log."""
        return self._folder("logs", self.results / "logs")

    @property
    def features(self) -> Path:
        """Folder of this experiment's single-cell profiles."""
        return self._folder("features", self.results / "features")

    @property
    def checks(self) -> Path:
        """Folder of what `check` found."""
        return self.outputs / "checks"


def open_project(
    root: Path,
    config_name: str,
    experiment: str = "results",
    single_cells: str = "single-cells",
    index_name: str = "index.csv",
) -> Project:
    """Open an existing project.

    Args:
        root: folder that holds inputs/; a trailing slash or none is the same.
        config_name: file below inputs/config, or a path.
        experiment: folder below outputs/ for what is trained and profiled.
        single_cells: folder below outputs/ for crops.
        index_name: the table of sites, below inputs/metadata.

    Raises:
        CellsError: there is no such folder; ConfigError: its configuration is not to be used.
    """
    root = Path(root)
    if not root.is_dir():
        raise CellsError(f"no project at {root}: make one with scripts/cells --root {root} setup")
    below = root / "inputs" / "config" / config_name
    config = read_config(below if below.is_file() or not Path(config_name).is_file() else Path(config_name))
    told = config.paths.get("root")
    for name in (experiment, single_cells):
        if name in ("", ".", "..") or "/" in name:
            raise CellsError(f"{name!r} cannot name a folder below {root}/outputs")
    return Project(Path(told) if told else root, config, experiment, single_cells, index_name)


def make_project(root: Path) -> list[Path]:
    """Lay out an empty project, or what is missing of one; nothing that exists is touched.

    Returns:
        The folders and files that were made.
    """
    root = Path(root)
    made = []
    for folder in (*(root / "inputs" / name for name in INPUTS), root / "outputs"):
        if not folder.is_dir():
            folder.mkdir(parents=True)
            made.append(folder)
    texts = {
        root / "inputs" / "config" / "config.json": json.dumps(example_config(), indent=2) + "\n",
        root / "inputs" / "config" / "config.schema.json": json.dumps(json_schema(), indent=2) + "\n",
        root / "inputs" / "metadata" / "index.csv": _EXAMPLE_INDEX,
    }
    for path, text in texts.items():
        others = list(path.parent.glob(f"*{path.suffix}"))
        if not others or (path.name == "config.schema.json" and not path.exists()):
            write_text(path, text)
            made.append(path)
    return made


__all__ = ["INPUTS", "Project", "check_config", "make_project", "open_project"]
