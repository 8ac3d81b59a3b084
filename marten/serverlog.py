"""What TorchServe's logs say about a model that does not load: the worker's own last words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

WORKER_DIED = "Worker died."
"""All that TorchServe itself says of a worker that ended while loading."""
_WORKER_LINE = re.compile(r"^\S+ \[[A-Z ]+\] W-\d+-(?P<model>.+)_[^_ ]+-std(?:out|err) MODEL_LOG - (?P<text>.*)$")
_LOAD_FAILED = re.compile(r" Load model failed: (?P<model>\S+), error: (?P<text>.*)$", re.MULTILINE)
_NOT_REGISTERED = re.compile(r" Failed to load model: (?P<file>\S+)\n(?P<text>[^\n]*)")
_MISSING_PACKAGE = re.compile(r"No module named '(?P<name>[\w.]+)'")
_START_FAILED = re.compile(
    r"Failed to bind to address: \S+|Invalid configuration: .*|Error occurred during initialization of VM\s*\n.*"
    r"|Unrecognized VM option .*|Invalid maximum heap size.*|java not found.*|UnsupportedClassVersionError.*"
    r"|java\.lang\.OutOfMemoryError.*"
)
# the package that brings a module, where the two differ in name
_PACKAGES = {"yaml": "pyyaml", "PIL": "pillow", "pynvml": "nvidia-ml-py", "skimage": "scikit-image"}


def load_failure(logs: Path, models: Mapping[str, str]) -> str | None:
    """Tell the first model that cannot be served, and why, in one line; None while all is well.

    Args:
        logs: folder of ts_log.log, model_log.log and server.log.
        models: file in the model store by endpoint name.
    """
    server = _text(logs / "ts_log.log") + _text(logs / "server.log")
    died = _LOAD_FAILED.search(server)
    if died:
        return f"{died['model']}: {explain(last_words(logs, died['model']) or died['text'])}"
    refused = _NOT_REGISTERED.search(server)
    if refused:
        name = next((name for name, file in models.items() if file == refused["file"]), refused["file"])
        return f"{name}: TorchServe cannot read {refused['file']}: {refused['text']}"
    return None


def start_failure(logs: Path) -> str | None:
    """Why Java or TorchServe itself did not come up, in one line, or None when the logs do not say."""
    text = _text(logs / "server.log") + _text(logs / "ts_log.log")
    found = _START_FAILED.search(text)
    if found:
        return " ".join(found[0].split())
    lines = [line for line in _text(logs / "server.log").splitlines() if line.strip() and line[0] not in " \t"]
    return lines[-1] if lines else None


def last_words(logs: Path, model: str) -> str | None:
    """The exception that ended a model's worker, in one line of at most 400 characters.

    It is the last that its log tells, but for one: when a handler file cannot be imported, TorchServe looks for a
    handler of its own by that name, and the failure of this second search is told last.
    """
    lines = map(_WORKER_LINE.match, _text(logs / "model_log.log").splitlines())
    said = [line["text"] for line in lines if line and line["model"] == model]
    starts = [i for i, text in enumerate(said) if text.startswith("Traceback (most recent call last)")]
    words = [w for w in (_exception(said[i + 1 :]) for i in starts) if w and "'ts.torch_handler." not in w]
    return words[-1] if words else None


def _exception(lines: Sequence[str]) -> str | None:
    """The line after a traceback's frames, with the indented lines that belong to it."""
    begin = next((i for i, text in enumerate(lines) if text and not text[0].isspace()), None)
    if begin is None:
        return None
    more = itertools.takewhile(lambda text: text[:1].isspace(), lines[begin + 1 :])
    return " ".join(" ".join([lines[begin], *more]).split())[:400]


def explain(words: str) -> str:
    """Add what to do, where the worker's words have a known cure."""
    missing = _MISSING_PACKAGE.search(words)
    if missing:
        package = _PACKAGES.get(missing["name"].split(".")[0], missing["name"].split(".")[0])
        return f"{words}: the Python package {package} is missing here; pip install -r requirements.txt, or {package}"
    return words


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
