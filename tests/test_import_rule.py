"""Who may import whom: everything flows one way, and serving needs nothing of ours but modelspec.py."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = (
    "marten",
    "models",
    "handlers",
    "modelspec",
    "protocols",
    "engines",
    "explain",
    "telemetry",
    "scripts",
    "tests",
    "train_main",
    "predict_main",
)
# imported where they are used, never when a module of ours is: they are slow, optional or both
LATE = ("ts", "wandb", "optuna", "requests")
QUICK = ("marten.cli", "marten.errors", "marten.files", "marten.architectures", "modelspec")


def programs() -> list[Path]:
    """Every Python program of the repository: the two at its root, and the commands, which have no suffix."""
    commands = (
        p for p in (ROOT / "scripts").iterdir() if p.is_file() and p.read_bytes()[:22] == b"#!/usr/bin/env python3"
    )
    return sorted([*ROOT.glob("*_main.py"), *commands])


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports; what stands under TYPE_CHECKING does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        if not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)
    return names


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources("models"), ids=relative)
def test_an_architecture_imports_torch_and_torchvision_alone(path: Path) -> None:
    theirs = {"timm"} if path.stem == "timm_network" else set()
    assert roots(imported(path)) <= {"__future__", "torch", "torchvision", *theirs, *sys.stdlib_module_names}


@pytest.mark.parametrize("path", sources("handlers"), ids=relative)
def test_a_handler_never_imports_marten(path: Path) -> None:
    assert roots(imported(path)) & set(OURS) <= {"modelspec", "protocols", "engines", "explain", "telemetry"}


@pytest.mark.parametrize("name", ["protocols.py", "engines.py", "explain.py"])
def test_what_travels_imports_the_contract_alone(name: str) -> None:
    assert roots(imported(ROOT / name)) & set(OURS) == {"modelspec"}


@pytest.mark.parametrize("name", ["modelspec.py", "telemetry.py"])
def test_the_contract_imports_none_of_ours(name: str) -> None:
    assert not roots(imported(ROOT / name)) & set(OURS)


@pytest.mark.parametrize("path", sources("marten"), ids=relative)
def test_the_library_imports_only_itself_and_the_contract(path: Path) -> None:
    names = imported(path)
    assert roots(names) & set(OURS) <= {"marten", "modelspec", "engines", "explain", "models"}
    if "cells" not in path.parts:
        assert not {name for name in names if name.startswith("marten.cells")}
    if path.name != "__init__.py":
        assert not roots(imported(path, top_level_only=True)) & set(LATE)


@pytest.mark.parametrize("path", programs(), ids=relative)
def test_a_program_imports_the_library_alone(path: Path) -> None:
    assert roots(imported(path)) & set(OURS) <= {"marten", "modelspec", "models"}


def test_the_library_has_no_import_circle() -> None:
    """Counting only what is imported when a module is."""
    names = {relative(p).removesuffix(".py").replace("/", "."): p for p in sources("marten")}
    needs = {name: imported(path, top_level_only=True) & set(names) for name, path in names.items()}
    while ready := [name for name, needed in needs.items() if not needed]:
        needs = {name: needed - set(ready) for name, needed in needs.items() if name not in ready}
    assert needs == {}


@pytest.mark.parametrize("module", QUICK)
def test_quick_modules_do_not_import_torch(module: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    assert not roots(imported(path, top_level_only=True)) & {"torch", "torchvision", "numpy", "ts"}
