"""Which networks there are, and how one is built: a folder models/<arch>/ with <arch>.py in it is one, or a few.

Adding one is adding that file. It imports torch and torchvision only, defines exactly one class, whose constructor
takes `num_classes` and `dropout` and never downloads, and says in literals what a trainer must know:

    VARIANTS    {name for --conv_net: constructor arguments}
    HEAD        prefix of the parameters of its last layers, which start anew for other classes
    PREPROCESS  fields of modelspec.Preprocess that differ from its defaults
    PRETRAINED  {variant: {"torchvision": weights enum} or {"package": "module:file"}}

The literals are read without importing the file, so that `--help` needs no torch. Two files have no variants: they
build what torchvision and timm know by name, and marten/registries.py says the rest.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marten.errors import TrainingError, UsageError
from marten.files import MODELS
from modelspec import Preprocess

if TYPE_CHECKING:
    import torch

OWN = "own"
_FACTS = ("VARIANTS", "HEAD", "PREPROCESS", "PRETRAINED")


@dataclass(frozen=True)
class Architecture:
    """One network by the name that `--conv_net` takes.

    Attributes:
        name: for instance "resnet18".
        arch: folder and file below models/, for instance "resnet".
        path: of the file.
        arch_args: constructor arguments that make this variant, without `num_classes` and `dropout`.
        head: parameter prefix of the last layers.
        preprocess: what its pretrained weights, or its author, expect.
        pretrained: where ImageNet weights come from; empty when there are none.
    """

    name: str
    arch: str
    path: Path
    arch_args: Mapping[str, Any]
    head: str
    preprocess: Preprocess
    pretrained: Mapping[str, str]


@functools.cache
def known_architectures() -> dict[str, Architecture]:
    """Every network below models/, by name, sorted.

    Raises:
        TrainingError: an architecture file lacks one of its literals.
    """
    found = {}
    for path in sorted(MODELS.glob("*/*.py")):
        if path.stem != path.parent.name:
            continue
        facts = _read_literals(path)
        for name, arch_args in facts["VARIANTS"].items():
            found[name] = Architecture(
                name=name,
                arch=path.stem,
                path=path,
                arch_args=arch_args,
                head=facts["HEAD"],
                preprocess=Preprocess(**facts["PREPROCESS"]),
                pretrained=facts["PRETRAINED"].get(name, {}),
            )
    return dict(sorted(found.items()))


def find_architecture(name: str) -> Architecture:
    """The network of that name: one of ours, or one of torchvision's or timm's.

    Raises:
        UsageError: there is none; lists the known ones and the nearest.
    """
    known = known_architectures()
    if name in known:
        return known[name]
    from marten.registries import find_foreign  # which needs torch

    if foreign := find_foreign(name):
        return foreign
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(
        f"no network called {name!r} in {MODELS}: there are {', '.join(known)}, and those of torchvision and timm{hint}"
    )


def find_preprocess(pre: str, architecture: Architecture) -> Preprocess:
    """How pictures are brought to a network: `own`, as its architecture has it, or as another network has it.

    Args:
        pre: "own"; the name of a network, ours, torchvision's or timm's; or a folder of models/, as "resnet".
        architecture: of the network that is trained.

    Raises:
        UsageError: there is no such network, or the one that is trained cannot take pictures of that size.
    """
    if pre == OWN:
        return architecture.preprocess
    families = {known.arch: known.preprocess for known in known_architectures().values()}
    preprocess = families.get(pre) or find_architecture(pre).preprocess
    if preprocess.size_px != architecture.preprocess.size_px:
        _check_size(pre, architecture, preprocess.size_px)
    return preprocess


def _check_size(pre: str, architecture: Architecture, size_px: tuple[int, int]) -> None:
    import torch

    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        network = build_network(architecture.arch, {**architecture.arch_args, "num_classes": 2}).eval()
        try:
            network(torch.zeros(1, 3, *size_px))
        except (RuntimeError, AssertionError, ValueError) as error:  # what torch, timm and torchvision raise
            (height, width), (own_height, own_width) = size_px, architecture.preprocess.size_px
            raise UsageError(
                f"--pre {pre} gives pictures of {width}x{height}, which {architecture.name} cannot take: its own are of"
                f" {own_width}x{own_height}"
            ) from error


def architecture_file(arch: str) -> Path:
    """Path of models/<arch>/<arch>.py.

    Raises:
        TrainingError: there is no such file.
    """
    path = MODELS / arch / f"{arch}.py"
    if not path.is_file():
        raise TrainingError(f"the card asks for the architecture {arch!r}, but there is no {path}")
    return path


def member_files(arch_args: Mapping[str, Any]) -> list[Path]:
    """Files of the networks that an ensemble is made of; none for any other network.

    Raises:
        TrainingError: one is missing.
    """
    return [architecture_file(arch) for arch in dict.fromkeys(one["arch"] for one in arch_args.get("members", ()))]


def build_network(arch: str, arch_args: Mapping[str, Any]) -> torch.nn.Module:
    """Build a network with fresh weights on the CPU, exactly as the handler builds it.

    Raises:
        TrainingError: no such architecture, or its constructor refuses the arguments.
    """
    path = architecture_file(arch)
    network_class = the_one_class(_import_file(path))
    try:
        return network_class(**arch_args)  # type: ignore[no-any-return]
    except (TypeError, KeyError, ValueError) as error:
        raise TrainingError(f"{path}: {network_class.__name__}({dict(arch_args)}) fails: {error}") from error


def the_one_class(module: Any) -> Any:
    """The single class that a module itself defines; TorchServe loads no other kind of file.

    Raises:
        TrainingError: none, or several, of any kind.
    """
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    if len(classes) != 1:
        names = [c.__name__ for c in classes]
        raise TrainingError(f"{module.__file__} must define exactly one class, found {names or 'none'}")
    return classes[0]


def _import_file(path: Path) -> Any:
    name = f"marten_models.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _read_literals(path: Path) -> dict[str, Any]:
    """Read the four literals at the top of an architecture file; simple arithmetic such as 127 / 255 is allowed."""
    facts: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in _FACTS:
            facts[node.targets[0].id] = _literal(node.value)
    missing = [name for name in _FACTS if name not in facts]
    if missing:
        raise TrainingError(f"{path} must assign {', '.join(missing)} at its top level, as plain literals")
    return facts


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _literal(left) / _literal(right)
        case ast.Tuple(elts=elements):
            return tuple(_literal(element) for element in elements)
        case ast.Dict(keys=keys, values=values):
            return {_literal(k): _literal(v) for k, v in zip(keys, values, strict=True) if k is not None}
        case _:
            return ast.literal_eval(node)
