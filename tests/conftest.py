"""What all tests share: the real pictures where there are some, and untrained models that need no training."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as engines.import_openvino has it


def pytest_configure(config: pytest.Config) -> None:
    """Let Pillow grumble about damaged pictures, and ts leave its files open; every other warning stays an error."""
    config.addinivalue_line("filterwarnings", "ignore::UserWarning:PIL")
    config.addinivalue_line("filterwarnings", "ignore::PIL.Image.DecompressionBombWarning")
    config.addinivalue_line("filterwarnings", "ignore:.*/ts/:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Leave torch its threads, whatever a test told it: sums over another number of them differ in their last bits."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real pictures, from the environment variable MARTEN_DATA."""
    named = os.environ.get("MARTEN_DATA")
    if not named:
        pytest.skip("needs real pictures: set MARTEN_DATA to their folder")
    folder = Path(named)
    if not folder.is_dir():
        pytest.skip(f"MARTEN_DATA names {folder}, which is no folder")
    return folder


@pytest.fixture(scope="session")
def drawn_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small drawn cats and dogs, never changed."""
    from tests.runs import draw_set

    return draw_set(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def whole_run(drawn_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on `drawn_set` by `tests.runs.QUICK` that nobody stopped; never changed."""
    from tests.runs import run_once

    out = tmp_path_factory.mktemp("whole")
    assert run_once(drawn_set, out) == 0
    return out


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make untrained models with their cards: `tiny_model("vgg", seed=1, topk=2)` is the path of a .pth.

    Further keywords are fields of ModelSpec. Equal calls share one file: do not change it, copy it. "Tiny" is the
    effort; cat_dog_conv_net is the smallest network (1.2 M parameters).
    """
    made: dict[str, Path] = {}

    def make(conv_net: str = "cat_dog_conv_net", seed: int = 0, **fields: Any) -> Path:
        key = repr((conv_net, seed, sorted(fields.items())))
        if key not in made:
            made[key] = save_untrained(tmp_path_factory.mktemp("model"), conv_net, seed, **fields)
        return made[key]

    return make


def save_untrained(folder: Path, conv_net: str, seed: int, **fields: Any) -> Path:
    """Write model_<conv_net>.pth with random weights, and its card, as training would."""
    import torch

    from marten.architectures import build_network, find_architecture
    from modelspec import ModelCard, ModelSpec, sha256_file

    architecture = find_architecture(conv_net)
    labels = fields.pop("labels", ("cat", "dog"))
    outputs = fields.pop("outputs", len(labels))
    spec = ModelSpec(
        name=fields.pop("name", conv_net),
        arch=architecture.arch,
        arch_args={**architecture.arch_args, "num_classes": outputs, "dropout": 0.1},
        labels=labels,
        preprocess=fields.pop("preprocess", architecture.preprocess),
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(spec.arch, spec.arch_args).eval()
        _spread_outputs(network, spec.preprocess.size_px)
    weights = folder / f"model_{conv_net}.pth"
    torch.save(network.state_dict(), weights)
    card = ModelCard(spec, sha256_file(weights), provenance={"created": "2024-05-06T07:08:09Z"})
    weights.with_suffix(".json").write_text(card.to_json(), encoding="utf-8")
    return weights


def _spread_outputs(network: Any, size_px: tuple[int, int]) -> None:
    """Scale the last layer so that answers differ from picture to picture, and none is certain."""
    import torch

    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.inference_mode():
        outputs_NK = network(torch.nn.functional.interpolate(torch.randn(8, 3, 6, 8), size_px, mode="bicubic"))
    scale = 1 / outputs_NK.std(0).mean()
    with torch.no_grad():
        last.bias.copy_((last.bias - outputs_NK.mean(0)) * scale)
        last.weight.mul_(scale)


@pytest.fixture(scope="session")
def unpack(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Unpack archives: `unpack(path)` is a new folder with the files of a .mar, as TorchServe makes one."""

    def unpacked(mar: Path) -> Path:
        folder = tmp_path_factory.mktemp(mar.stem)
        with zipfile.ZipFile(mar) as archive:
            archive.extractall(folder)
        return folder

    return unpacked
