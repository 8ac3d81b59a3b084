"""Many sites at once: a pool of processes whose answers come back in order, and whose memory stays bounded."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from marten.cells.errors import CellsError

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 4
"""Tasks in flight per process: enough that none waits, few enough that results do not pile up."""


def usable_cpus() -> int:
    """How many processors this process may use, which on a cluster is fewer than the machine has."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(told)) if told.isdigit() and int(told) else allowed)


def ordered_map(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Apply `work` to every task and give the answers in the order of the tasks.

    Args:
        work: a function of a module, so that it can be sent to another process.
        tasks: read as they are needed, never all at once.
        workers: processes; 0 or 1 works in this one.

    Raises:
        CellsError: a worker was killed, which is mostly the memory's end. Errors of `work` itself are passed on.
    """
    if workers <= 1:
        yield from map(work, tasks)
        return
    # spawn: a forked child would inherit half of any library's threads
    context: Any = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        flying: deque[Future[R]] = deque()
        try:
            for task in tasks:
                flying.append(pool.submit(work, task))
                if len(flying) >= AHEAD * workers:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        except BrokenProcessPool as error:
            raise CellsError(
                "a worker process was killed, probably for want of memory: give fewer --workers"
            ) from error
        finally:
            for future in flying:
                future.cancel()
