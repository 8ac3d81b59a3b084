"""How many workers each model gets, and how many threads each worker, so that all of them together fill the cores.

TorchServe by itself gives every worker as many threads as there are cores: with four models on two cores, eight
threads fight, and all together answer a fifth of what one model alone does.
"""

from __future__ import annotations

import os
from pathlib import Path

MOST_WORKERS = 8
"""Workers of one model at most; on larger machines each gets more threads instead."""

WORKER_BYTES = 1_500_000_000
"""Memory set aside for one worker: torch, a network of VGG's size, and a batch of large pictures."""


def fit_workers(models: int, cores: int, memory_bytes: int) -> int:
    """Workers for each of several models: one per core while cores and memory last, at least one.

    One thread each gives the most answers per second, because decoding and TorchServe's own share of a request do
    not spread over threads.
    """
    by_cores = cores // max(1, models)
    by_memory = memory_bytes // WORKER_BYTES // max(1, models)
    return max(1, min(by_cores, by_memory, MOST_WORKERS))


def fit_threads(workers: int, cores: int) -> int:
    """Threads for each of all workers of the machine, at least one."""
    return max(1, cores // max(1, workers))


def fit_shared_cores(models: int, cores: int) -> int:
    """Cores that a batch may take while nobody else needs them; one where there are more models than cores.

    For this each worker holds its network twice, and with many models memory is scarcer than cores are idle.
    """
    return cores if models <= cores else 1


def available_cores() -> int:
    """Cores this process may use: the scheduler's or container's share, where that is less than the machine's."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max 100000"
        return allowed


def available_memory() -> int:
    """Bytes that can be had without swapping, within a container's limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return free


def has_gpu() -> bool:
    """Whether an NVIDIA driver is at work here; asked without importing torch."""
    return Path("/proc/driver/nvidia/version").exists()
