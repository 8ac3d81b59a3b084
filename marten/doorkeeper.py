"""The front door in a container: makes the secrets that are missing, runs Envoy, drains it when told to end.

python -m marten.doorkeeper /etc/envoy/envoy.yaml [NAME …]      names for a new certificate, besides the machine's

MARTEN_MODELS, as vgg,base_cnn, names the models behind it: the page offers them all, and the first is asked for health.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from marten.credentials import open_or_make
from marten.envoy import drain, find_envoy
from marten.errors import FAILED, MartenError, UsageError
from marten.files import write_text

ADMIN = Path("/tmp/envoy-admin.sock")
"""Where deployment/proxy/envoy.yaml puts Envoy's administration."""

DRAIN_S = 20.0


WEB = Path("/srv/web")
"""The page, with the names of the models that it offers."""


def for_models(config: Path, names: str, folder: Path) -> Path:
    """Write settings for other models than the shipped ones into a folder; gives the file to start Envoy with.

    Raises:
        UsageError: no names, or names that are no model's.
    """
    models = [name.strip() for name in names.split(",")]
    if not all(re.fullmatch(r"[\w.-]+", name) for name in models):
        raise UsageError(f"MARTEN_MODELS must be names with commas between, as vgg,base_cnn; found {names!r}")
    replicas = config.with_name("replicas.yaml")
    asked = re.sub(r"(path: /predictions/)\S+", rf"\g<1>{models[0]}", replicas.read_text(encoding="utf-8"))
    write_text(folder / "replicas.yaml", asked)
    write_text(folder / "models.json", json.dumps({"models": models}))
    text = config.read_text(encoding="utf-8")
    for shipped in (replicas, WEB / "models.json"):
        text = text.replace(str(shipped), str(folder / shipped.name))
    write_text(folder / config.name, text)
    return folder / config.name


def keep(config: Path, names: Sequence[str]) -> int:
    """Run Envoy until SIGTERM or SIGINT, then let what is under way be answered.

    Returns:
        0 after a signal and a full drain; 1 where requests were cut off, or where Envoy ended by itself.
    """
    for file in open_or_make(config.parent / "secrets", names)[1]:
        print(f"made {file}", flush=True)
    if names_told := os.environ.get("MARTEN_MODELS", ""):
        config = for_models(config, names_told, Path(tempfile.mkdtemp(prefix="marten-door-")))
    told_to_end = False

    def end(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    door = subprocess.Popen([str(find_envoy()), "-c", str(config), "-l", "warning"], start_new_session=True)
    try:
        door.wait()
    except KeyboardInterrupt:
        told_to_end = True
    late = drain(ADMIN, door.pid, DRAIN_S) if told_to_end else 0
    door.wait()
    return 0 if told_to_end and not late else FAILED


if __name__ == "__main__":
    try:
        sys.exit(keep(Path(sys.argv[1]), sys.argv[2:]))
    except MartenError as error:
        print(f"doorkeeper: {error}", file=sys.stderr)
        sys.exit(FAILED)
