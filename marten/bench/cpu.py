"""What one picture takes of the processors in a running server: Java's and its workers' time, counted by the kernel.

Unlike answers per second it hardly depends on what else the machine does, so it can be measured on a busy one.
"""

from __future__ import annotations

from collections.abc import Sequence

from marten.client import Client, Patience
from marten.errors import DataError, ServerError
from marten.runtime import Running


def cpu_seconds_per_picture(
    running: Running, name: str, bodies: Sequence[bytes], at_once: int, pictures: int = 64
) -> float:
    """Ask about pictures, `at_once` of them under way, and see what the server's processes used meanwhile.

    Raises:
        ServerError: a picture was not answered, or a worker was replaced meanwhile.
        DataError: there are no pictures to ask about.
    """
    from concurrent.futures import ThreadPoolExecutor

    if not bodies:
        raise DataError("no pictures to ask about: name a folder of .jpg files with --img_path")
    with Client(running.addresses["inference"].url, patience=Patience(timeout_s=60, tries=1)) as client:

        def ask(i: int) -> None:
            client.predict(name, bodies[i % len(bodies)])

        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(ask, range(2 * at_once)))  # so that nothing is done for the first time
            before = _used_s(running.pid)
            list(pool.map(ask, range(pictures)))
            after = _used_s(running.pid)
    if before.keys() != after.keys():
        raise ServerError(f"a process of the server was replaced while it was measured: see {running.logs}")
    return (sum(after.values()) - sum(before.values())) / pictures


def _used_s(pid: int) -> dict[int, float]:
    """Processor time by process, of Java and everything below it."""
    import psutil

    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return {process.pid: sum(process.cpu_times()[:2]) for process in family}
