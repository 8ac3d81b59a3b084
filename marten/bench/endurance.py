"""Whether memory stays what it is under steady load, and whether a leak would be seen: one is planted."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from marten.bench.report import Row
from marten.bench.stack import Stack, stacked, tell

_LEAKY = """
class Leaky:
    def initialize(self, context):
        self.kept = []

    def handle(self, rows, context):
        self.kept += [b"x" * 20_000 for row in rows]
        return [{"kept": len(self.kept)} for row in rows]
"""


def soak(stack: Stack) -> list[Row]:
    """Watch the memory of Envoy, of the TorchServes and of their workers while two clients ask."""
    allowed = allowed_mb_h(stack.lengths.seconds)
    slopes = _slopes(stack)
    kinds = {"Envoy": ["Envoy"], "Java": [n for n in slopes if n.startswith("Java")]}
    kinds["a worker"] = [name for name in slopes if name.startswith("worker")]
    return [
        Row(
            f"soak of {stack.lengths.seconds:.0f} s: growth of {kind}, MB/h",
            max(slopes[n] for n in names),
            allowed,
            False,
        )
        for kind, names in kinds.items()
    ]


def leak(stack: Stack) -> list[Row]:
    """The same with a handler that keeps 20 kB of each request: the figure must be far off."""
    with tempfile.TemporaryDirectory(prefix="ml-") as name:
        _pack_leaky(Path(name))
        with stacked("", stack.lengths, stack.say, replicas=1, store=Path(name)) as leaky:
            slopes = _slopes(leaky)
    worst = max(value for name, value in slopes.items() if name.startswith("worker"))
    allowed = allowed_mb_h(stack.lengths.seconds)
    return [Row(f"planted leak over {stack.lengths.seconds:.0f} s: growth of its worker, MB/h", worst, allowed, True)]


def allowed_mb_h(seconds: float) -> float:
    """Growth that counts as none: 1 MB/h, and 4 MB that an allocator may take or give back within the time."""
    return 1 + 4 / (seconds / 2 / 3600)


def slope_mb_h(samples: Sequence[tuple[float, float]]) -> float:
    """Growth by least squares of (seconds, bytes) samples, without their first half, which warms up."""
    later = samples[len(samples) // 2 :]
    line = statistics.linear_regression([at for at, _ in later], [used for _, used in later])
    return float(line.slope) * 3600 / 1e6


def _slopes(stack: Stack) -> dict[str, float]:
    import psutil

    watched = {f"worker {pid}": psutil.Process(pid) for pid in stack.workers()}
    watched |= {f"Java {r.pid}": psutil.Process(r.pid) for r in stack.fleet.running()}
    watched["Envoy"] = psutil.Process(stack.fleet.pid)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in watched}
    begun = time.monotonic()
    pause_s = max(0.25, min(5.0, stack.lengths.seconds / 100))
    with stack.crowd(2, rest_s=stack.lengths.rest_s) as crowd:
        while time.monotonic() < begun + stack.lengths.seconds:
            for name, process in watched.items():
                samples[name].append((time.monotonic() - begun, process.memory_info().rss))
            time.sleep(pause_s)
    tell(stack, "meanwhile", crowd)
    found = {name: slope_mb_h(taken) for name, taken in samples.items()}
    for name, taken in samples.items():
        used = f"{taken[0][1] / 1e6:.0f} to {taken[-1][1] / 1e6:.0f} MB"
        stack.say(f"  {name}: {used}, {found[name]:+.1f} MB/h in the second half")
    return found


def _pack_leaky(store: Path) -> None:
    model = {"modelName": "leaky", "handler": "handler.py", "modelVersion": "1.0"}
    manifest = {"createdOn": "", "runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    with zipfile.ZipFile(store / "leaky.mar", "w") as archive:
        archive.writestr("handler.py", _LEAKY)
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
