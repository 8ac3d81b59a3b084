"""What clients of the front door see while things break behind it: workers, replicas, archives, callers, memory.

Each fault is a function from a running `Stack` to figures with what they must be; `scripts/bench faults` runs them.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import ssl
import time
from collections.abc import Callable, Sequence

from marten import fleet
from marten.bench.endurance import leak, soak
from marten.bench.load import percentile
from marten.bench.outside import reach_from_outside
from marten.bench.report import Row
from marten.bench.stack import START_S, TICK_S, Stack, tell
from marten.runtime import find_process

# ------------------------------------------------------------------------------------------ deaths and replacements


def kill_workers(stack: Stack) -> list[Row]:
    """Kill a worker every so often while clients ask."""
    killed = 0
    with stack.crowd() as crowd:
        ends = time.monotonic() + stack.lengths.seconds
        while time.monotonic() < ends:
            pids = list(stack.workers())
            if pids:
                with contextlib.suppress(ProcessLookupError):  # one that was being replaced just then
                    os.kill(stack.dice.choice(pids), signal.SIGKILL)
                    killed += 1
            time.sleep(min(stack.lengths.every_s, max(0.0, ends - time.monotonic())))
    tell(stack, f"{killed} workers killed", crowd)
    stack.wait_until_whole()
    return [Row(f"{killed} workers killed: requests that failed", len(crowd.failed), 0, False)]


def terminate_replicas(stack: Stack) -> list[Row]:
    """Send SIGTERM to one TorchServe after the other, which drops what it has, and start another in its place."""
    with stack.crowd() as crowd:
        for turn in range(stack.lengths.count):
            victim = stack.fleet.running()[0]
            os.kill(victim.pid, signal.SIGTERM)
            while find_process(victim.pid) is not None:
                time.sleep(TICK_S)
            stack.fleet = fleet.mend(stack.fleet, stack.crew, START_S)
            stack.wait_until_whole()
            stack.say(f"  {turn + 1} of {stack.lengths.count} ended and replaced, {len(crowd.failed)} failed so far")
    tell(stack, f"{stack.lengths.count} SIGTERMs", crowd)
    return [Row(f"{stack.lengths.count} SIGTERMs to a replica: requests lost", len(crowd.failed), 0, False)]


def update_models(stack: Stack) -> list[Row]:
    """Replace every replica, again and again."""
    with stack.crowd() as crowd:
        for turn in range(stack.lengths.count):
            stack.fleet = fleet.update(stack.fleet, stack.crew, START_S)
            stack.say(f"  {turn + 1} of {stack.lengths.count} updates, {len(crowd.failed)} failed so far")
    tell(stack, f"{stack.lengths.count} rolling updates", crowd)
    return [Row(f"{stack.lengths.count} rolling updates: requests lost", len(crowd.failed), 0, False)]


def freeze_workers(stack: Stack) -> list[Row]:
    """Stop a worker (SIGSTOP) without ending it; TorchServe's own /ping would say Healthy."""
    noticed: list[float] = []
    with stack.crowd() as crowd:
        for _ in range(stack.lengths.count):
            pid, replica = stack.dice.choice(list(stack.workers().items()))
            port, begun = replica.addresses["inference"].port, time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            try:
                while stack.fleet.is_healthy(port) and time.monotonic() - begun < 60:
                    time.sleep(TICK_S)
                noticed.append(time.monotonic() - begun)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            stack.wait_until_whole()
    tell(stack, "workers frozen", crowd)
    return [
        Row("frozen worker: noticed after, s", max(noticed), 5, False),
        Row("frozen worker: requests that failed", len(crowd.failed), 0, False),
    ]


# ------------------------------------------------------------------------------------------ too many, too slow


def overload(stack: Stack) -> list[Row]:
    """As many clients as can be answered, then several times as many, who come again after a tenth of a second."""
    enough = 16
    with stack.crowd(enough) as calm:
        time.sleep(stack.lengths.seconds)
    with stack.crowd(enough * stack.lengths.times, pause_s=0.1) as crowd:
        time.sleep(stack.lengths.seconds)
    tell(stack, f"{enough} clients", calm)
    tell(stack, f"{enough * stack.lengths.times} clients", crowd)
    refused = [each for each in crowd.failed if each.status in (429, 503)]
    other = len(crowd.failed) - len(refused)
    slow_ms = 1000 * percentile([each.took_s for each in refused], 50) if refused else 0.0
    ready = sum(each.retry_after for each in refused) / max(1, len(refused))
    return [
        Row(
            f"{stack.lengths.times} × overload: goodput ÷ peak",
            len(crowd.answered) / max(1, len(calm.answered)),
            0.9,
            True,
        ),
        Row("overload: refused within, ms (median)", slow_ms, 50, False),
        Row("overload: refusals that say when to come again", ready, 1, True),
        Row("overload: requests that failed otherwise", other, 0, False),
    ]


def half_open(stack: Stack) -> list[Row]:
    """Hold connections that stop in the middle: of the handshake, of the header, of the picture."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * stack.lengths.half_open + 1000)), hard))
    with stack.crowd(2) as calm:
        time.sleep(stack.lengths.seconds)
    context = stack.entrance.context()
    head = f"PUT /predictions/{stack.model} HTTP/1.1\r\nHost: door\r\n".encode()
    rest = f"Authorization: Bearer {stack.entrance.key}\r\nContent-Length: 100000\r\n\r\nabc".encode()
    with contextlib.ExitStack() as held:
        sockets = []
        for turn in range(stack.lengths.half_open):
            each = stack.entrance.dial()
            if turn % 3:
                each = context.wrap_socket(each, server_hostname="localhost")
                each.sendall(head + rest * (turn % 3 == 2))
            sockets.append(held.enter_context(each))
        opened = time.monotonic()
        with stack.crowd(2) as crowd:
            time.sleep(min(stack.lengths.seconds, 8.0))
        closed_s = _seconds_until_closed(sockets, opened)
    tell(stack, "nobody half open", calm)
    tell(stack, f"{len(sockets)} half open", crowd)
    return [
        Row(
            f"{len(sockets)} half-open connections: p99 ÷ p99 without",
            crowd.latency_s(99) / calm.latency_s(99),
            2,
            False,
        ),
        Row("half-open connections: others' requests that failed", len(crowd.failed), 0, False),
        Row("half-open connections: closed after, s", closed_s, 35, False),
    ]


def _seconds_until_closed(sockets: Sequence[socket.socket], opened: float) -> float:
    waiting = list(sockets)
    while waiting and time.monotonic() - opened < 60:
        waiting = [each for each in waiting if not _is_closed(each)]
        time.sleep(0.2)
    return time.monotonic() - opened


def _is_closed(held: socket.socket) -> bool:
    """Whether the other side has said its last word; what it said before is read away."""
    held.settimeout(0)
    try:
        return held.recv(4096) == b""
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True


FAULTS: dict[str, Callable[[Stack], list[Row]]] = {
    "kill": kill_workers,
    "freeze": freeze_workers,
    "term": terminate_replicas,
    "update": update_models,
    "overload": overload,
    "half_open": half_open,
    "outside": reach_from_outside,
    "soak": soak,
    "leak": leak,
}
"""By the names that `scripts/bench faults --fault` takes."""
