"""Every key of a configuration is honoured, defaulted or refused by name."""

from __future__ import annotations

import json

import pytest

from marten.cells.config import KEYS, check_config, example_config, json_schema, read_config
from marten.cells.errors import CellsError, ConfigError
from marten.cells.project import make_project, open_project

LEAST = {"dataset": {"metadata": {"label_field": "t"}, "images": {"channels": ["DNA"]}}}


def changed(**keys):
    raw = json.loads(json.dumps(LEAST))
    for key, value in keys.items():
        node = raw
        *groups, name = key.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return raw


def test_a_minimal_configuration_has_defaults_for_everything_else():
    config = check_config(LEAST)
    assert config["dataset.locations.box_size"] == 128
    assert config["train.model.params.learning_rate"] == 0.005
    assert config.target == "t"
    assert not config.uses_outlines


@pytest.mark.parametrize("name", ["base5.json", "export_mask5.json", "train5.json"])
def test_deepprofilers_own_configurations_are_taken(painting, name):
    config = read_config(painting / "bbbc037_deepprofiler_example/inputs/config" / name)
    assert config.channels == ["DNA", "RNA", "ER", "AGP", "Mito"]
    assert all("is not known" not in note for note in config.notes)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"dataset.images.channels": "DNA"}, "dataset.images.channels must be a list of texts"),
        ({"dataset.images.channels": ["DNA", "DNA"]}, "repeats"),
        ({"dataset.locations.box_size": "128"}, "box_size must be a whole number"),
        ({"dataset.locations.box_size": 0}, "at least 2"),
        ({"dataset.locations.mode": "single_cell"}, "one of single_cells, full_image"),
        ({"dataset.locations.mask_objects": True}, "prepare.outlines is empty"),
        ({"train.model.name": "autoencoder"}, "train.model.name must be one of efficientnet"),
        ({"train.model.params.lerning_rate": 1}, "did you mean train.model.params.learning_rate"),
        ({"train.model.params.conv_blocks": 8}, "B0 to B7"),
        ({"train.partition.training": [0], "train.partition.validation": ["0"]}, "in training and in validation"),
        ({"paths.imagse": "x"}, "paths.imagse is not known"),
        ({"train.model.epochs": True}, "must be a whole number"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(keys, told):
    with pytest.raises(ConfigError, match=told):
        check_config(changed(**keys))


def test_a_missing_key_is_told_with_its_kind_and_purpose():
    with pytest.raises(ConfigError, match=r"lacks dataset\.images\.channels \(a list of texts\)"):
        check_config({"dataset": {"metadata": {"label_field": "t"}}})
    with pytest.raises(ConfigError, match=r"lacks profile\.checkpoint .* needed to load the network"):
        check_config(LEAST).need("profile.checkpoint", "load the network")


def test_keys_without_effect_and_unknown_ones_are_told():
    config = check_config(
        changed(**{"train.sampling.alpha": 0.3, "comet": "x", "train.partition.training_values": [7]})
    )
    assert any(note.startswith("train.sampling.alpha changes nothing") for note in config.notes)
    assert "comet is not known here and changes nothing" in config.notes
    assert config["train.partition.training"] == [7]


def test_the_schema_knows_every_key_and_the_example_is_valid(tmp_path):
    schema = json_schema()
    for key in KEYS:
        node = schema
        for name in key.split("."):
            node = node["properties"][name]
        assert node["description"]
    check_config(example_config())
    made = make_project(tmp_path / "new")
    assert (tmp_path / "new/inputs/metadata/index.csv") in made
    assert make_project(tmp_path / "new") == []
    assert open_project(tmp_path / "new", "config.json").config.notes == ()


def test_a_project_or_configuration_that_is_not_there(tmp_path):
    with pytest.raises(CellsError, match="make one with scripts/cells"):
        open_project(tmp_path / "none", "config.json")
    with pytest.raises(ConfigError, match="no configuration at"):
        open_project(tmp_path, "config.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        open_project(tmp_path, str(tmp_path / "bad.json"))


def test_paths_may_be_overridden_and_escape_nothing(tiny):
    tiny.config(**{"paths.features": "elsewhere/features"})
    project = tiny.open()
    assert project.features == tiny.root / "elsewhere/features"
    with pytest.raises(CellsError, match="cannot name a folder"):
        tiny.open(experiment="../x")
