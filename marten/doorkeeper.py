"""The front door in a container: makes the secrets that are missing, runs Envoy, drains it when told to end.

python -m marten.doorkeeper /etc/envoy/envoy.yaml [NAME …]      names for a new certificate, besides the machine's
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from marten.credentials import open_or_make
from marten.envoy import drain, find_envoy
from marten.errors import FAILED, MartenError

ADMIN = Path("/tmp/envoy-admin.sock")
"""Where deployment/proxy/envoy.yaml puts Envoy's administration."""

DRAIN_S = 20.0


def keep(config: Path, names: Sequence[str]) -> int:
    """Run Envoy until SIGTERM or SIGINT, then let what is under way be answered.

    Returns:
        0 after a signal and a full drain; 1 where requests were cut off, or where Envoy ended by itself.
    """
    for file in open_or_make(config.parent / "secrets", names)[1]:
        print(f"made {file}", flush=True)
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
