"""Which Python runs a program: the project's own `.venv` where there is one, or a plain word on how to make it.

Imported before everything else, so it needs the standard library alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def enter_environment(root: Path) -> None:
    """Go on in the `.venv` of `root` when one is there and no other environment was chosen.

    So `scripts/serve` works whether or not `.venv` was activated. Containers and clusters have no `.venv`; there the
    Python that runs must hold what requirements.txt names, and the process ends with one line where it does not.
    """
    python = root / ".venv" / "bin" / "python"
    chosen = any(os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")) or sys.prefix != sys.base_prefix
    if python.is_file() and not chosen:
        os.execv(python, [str(python), *sys.argv])
    if importlib.util.find_spec("PIL") is None:
        sys.exit(
            f"{Path(sys.argv[0]).name}: {sys.executable} lacks Marten's packages; make them a home in .venv with "
            "`bash scripts/quickstart.sh`, or install them here with `python3 -m pip install -r requirements.txt`"
        )
