"""Memory that a step frees is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from marten.files import ROOT

STEPS = """
import resource, sys, torch
from marten.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    return (torch.ones(32 * 2**20) + 1).sum().item()
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
assert {step() for _ in range(10)} == {2.0 * 32 * 2**20}
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed blocks back at once")
def test_freed_memory_is_not_asked_for_again() -> None:
    faults = {
        word: int(subprocess.check_output([sys.executable, "-c", STEPS, word], cwd=ROOT, text=True, timeout=120))
        for word in ("kept", "given back")
    }
    # ten steps of two tensors of 32,768 pages each; a small block in between may cost the heap one tensor more
    assert faults["given back"] > 9 * 2 * 32_768
    assert faults["kept"] <= 2 * 32_768
