"""Whether only the front door answers from elsewhere: a network namespace stands in for another machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from marten.bench.report import Row
from marten.bench.stack import Stack

_PROBE = """
import json, socket, ssl, sys, urllib.request
host, door, ports = sys.argv[1], int(sys.argv[2]), [int(p) for p in sys.argv[4:]]
def opens(port):
    try:
        socket.create_connection((host, port), timeout=2).close()
        return True
    except OSError:
        return False
trusting = ssl.create_default_context(cafile=sys.argv[3])
trusting.check_hostname = False
told = urllib.request.urlopen(f"https://{host}:{door}/ready", context=trusting, timeout=5).status
print(json.dumps({"ready": told, "open": [p for p in ports if opens(p)]}))
"""


def reach_from_outside(stack: Stack) -> list[Row]:
    """Try every port that the door and its replicas listen on, from another network namespace."""
    if os.geteuid() or shutil.which("ip") is None:
        stack.say("  not run: making a network namespace needs root and the command ip")
        return []
    door = int(stack.entrance.url.rpartition(":")[2])
    ports = sorted(_listening(stack) | {door})
    with machine() as elsewhere:
        asked = [elsewhere.near, str(door), str(stack.entrance.certificate), *map(str, ports)]
        probe = [*elsewhere.inside, sys.executable, "-c", _PROBE, *asked]
        told = subprocess.run(probe, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(told.stdout)
    stack.say(f"  ports listened on: {ports}; open from outside: {found['open']}; /ready there: {found['ready']}")
    others = [port for port in found["open"] if port != door]
    return [
        Row("another network namespace: the door's /ready", found["ready"], 200, True),
        Row(f"another network namespace: other ports of {len(ports) - 1} that answer", len(others), 0, False),
    ]


def _listening(stack: Stack) -> set[int]:
    """TCP ports of Envoy, of each TorchServe and of its workers."""
    import psutil

    roots = [psutil.Process(pid) for pid in (stack.fleet.pid, *(r.pid for r in stack.fleet.running()))]
    family = [process for root in roots for process in (root, *root.children(recursive=True))]
    connections = [c for process in family for c in process.net_connections("tcp")]
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


@dataclass(frozen=True)
class Machine:
    """What stands in for another machine: a network namespace at the other end of a wire.

    Attributes:
        near: address of this end of the wire.
        far: address of that machine.
        inside: words before a command that is to run there.
        cut: command that cuts the wire at its far end; cut here, packets would look for another way.
    """

    near: str
    far: str
    inside: tuple[str, ...]
    cut: tuple[str, ...]


@contextlib.contextmanager
def machine(number: int = 0) -> Iterator[Machine]:
    """Another machine, taken away in the end; needs root and the command ip. `number` tells several apart."""
    name, near, far = (f"{kind}{os.getpid()}-{number}"[-15:] for kind in ("marten", "mo", "mt"))
    here, there = f"10.213.{47 + number}.1", f"10.213.{47 + number}.2"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        ip("addr", "add", f"{here}/30", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", name, "addr", "add", f"{there}/30", "dev", far)
        ip("-n", name, "link", "set", far, "up")
        yield Machine(here, there, ("ip", "netns", "exec", name), ("ip", "-n", name, "link", "set", far, "down"))
    finally:
        ip("netns", "del", name)  # the wire goes with it
