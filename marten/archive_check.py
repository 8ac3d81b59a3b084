"""What would break an archive when TorchServe loads it, found in its sources before it is built."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from marten.errors import ArchiveError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Source: model_archiver's check_model_name_regex_or_exit."""

OLDEST_PYTHON = (3, 9)
"""The official TorchServe image's."""

CONFIG_KEYS: dict[str, type] = {
    "minWorkers": int,
    "maxWorkers": int,
    "batchSize": int,
    "maxBatchDelay": int,
    "responseTimeout": int,
    "startupTimeout": int,
    "maxRetryTimeoutInSec": int,
    "clientTimeoutInMills": int,
    "jobQueueSize": int,
    "useJobTicket": bool,
    "deviceType": str,
    "deviceIds": list,
    "parallelType": str,
    "parallelLevel": int,
    "asyncCommunication": bool,
    "useVenv": bool,
    "handler": dict,
    "pt2": dict,
}
"""Keys of model-config.yaml that mean something for a picture classifier.

Source: ModelConfig.build in TorchServe 0.12's server, which drops an unknown key in silence and a value of another
type with a line in its log; and BaseHandler.initialize for `pt2`.
"""


def check_name(name: str) -> None:
    """Refuse a name that cannot be an archive's and an endpoint's.

    Raises:
        ArchiveError: with the rule.
    """
    if not NAME.fullmatch(name):
        raise ArchiveError(f"{name!r} cannot name an archive: letters, digits, then also '-', '_' and '.'; give --name")


def check_sources(one_class: Sequence[Path], others: Sequence[Path], files: Sequence[Path]) -> None:
    """Check the Python files of an archive, and that all its files can lie side by side.

    Args:
        one_class: Python files of which TorchServe builds the one class: the network's and the handler's.
        others: further Python files.
        files: everything else that is packed; `others` may be among them.

    Raises:
        ArchiveError: a missing file, a name that two files share or that the archiver would split, a file without
            exactly one class, or syntax newer than Python 3.9.
    """
    everything = list(dict.fromkeys([*one_class, *others, *files]))
    for path in everything:
        if not path.is_file():
            raise ArchiveError(f"there is no {path}, which belongs into the archive")
        if set(str(path.resolve())) & set(",*?[]"):
            raise ArchiveError(f"the archiver would take {path} apart: move it to a path without , * ? [ ]")
    shared = [name for name, count in Counter(path.name for path in everything).items() if count > 1]
    if shared:
        raise ArchiveError(f"two files of the archive are called {', '.join(shared)}: it is flat, rename one")
    for path in [*one_class, *others]:
        tree = _parse(path)
        classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        if path in one_class and len(classes) != 1:
            raise ArchiveError(
                f"{path} must define exactly one class, found {', '.join(classes) or 'none'}: "
                "TorchServe builds the one class of this file and loads no other kind"
            )


def _parse(path: Path) -> ast.Module:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=OLDEST_PYTHON)
    except SyntaxError as error:
        raise ArchiveError(f"{path}:{error.lineno} is not Python {_OLDEST}: {error.msg}") from error
    lazy = any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)
    for annotation in [] if lazy else _annotations(tree):
        if any(isinstance(node, ast.BinOp) for node in ast.walk(annotation)):
            raise ArchiveError(
                f"{path}:{annotation.lineno}: Python {_OLDEST} cannot evaluate `{ast.unparse(annotation)}`: "
                "begin the file with `from __future__ import annotations`"
            )
    return tree


_OLDEST = ".".join(map(str, OLDEST_PYTHON))


def _annotations(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns:
            yield node.returns
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            yield node.annotation


def read_config(path: Path) -> dict[str, Any]:
    """Read a model-config.yaml.

    Raises:
        ArchiveError: it is missing, or no YAML mapping.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArchiveError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ArchiveError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ArchiveError(f"{path} must hold keys and values, as deployment/model-config.yaml does")
    return config


def check_config(path: Path) -> None:
    """Refuse what TorchServe would ignore without a word.

    Raises:
        ArchiveError: an unknown key, a value of another type, a number below zero, or a missing responseTimeout.
    """
    config = read_config(path)
    for key, value in config.items():
        kind = CONFIG_KEYS.get(key)
        if kind is None:
            raise ArchiveError(f"{path}: TorchServe ignores the unknown key {key!r}; known: {', '.join(CONFIG_KEYS)}")
        if type(value) is not kind:
            raise ArchiveError(f"{path}: {key} must be of type {kind.__name__}, found {value!r}; TorchServe ignores it")
        if isinstance(value, int) and value < 0:
            raise ArchiveError(f"{path}: {key} must not be negative, found {value}")
    if "responseTimeout" not in config:
        raise ArchiveError(f"{path} must set responseTimeout: without it TorchServe waits 120 s, whatever else says")
