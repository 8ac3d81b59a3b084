"""How many servers a stream of pictures needs, how long the pictures wait there, and what a million of them cost.

A simulation of what stands in deployment/: pictures come at random, the front door gives each to the less busy of two
servers, a server's workers take them from its queue in batches, a full queue refuses, and an autoscaler that obeys
deployment/kubernetes/base/scaling.yaml adds and removes servers. What one picture takes of a processor is measured on a
real server (`marten.bench.cpu`), prices are the reader's.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marten.files import ROOT

SCALING = ROOT / "deployment" / "kubernetes" / "base" / "scaling.yaml"
TICK_S = 15.0
"""How often Kubernetes' autoscaler looks. Source: --horizontal-pod-autoscaler-sync-period."""

_TOLERANCE = 0.1  # Source: --horizontal-pod-autoscaler-tolerance


@dataclass(frozen=True)
class Server:
    """One replica.

    Attributes:
        workers: processes that answer side by side.
        batch: pictures that one of them takes at once, at most.
        queue: pictures that may wait; the next is refused.
        picture_s: that a worker needs for a picture.
        batch_s: that it needs for a batch however small it is; what a GPU waits for.
        price_per_hour: in any currency.
    """

    workers: int = 2
    batch: int = 4
    queue: int = 64
    picture_s: float = 0.03
    batch_s: float = 0.0
    price_per_hour: float = 0.1

    @property
    def most_per_s(self) -> float:
        """Pictures that it answers in a second when it has nothing else to do and batches are full."""
        return self.workers * self.batch / (self.batch_s + self.batch * self.picture_s)


@dataclass
class Outcome:
    """What became of the pictures of one simulation; times in seconds."""

    latencies_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    refused: int = 0
    server_s: float = 0.0
    most_servers: int = 0

    @property
    def p99_s(self) -> float:
        """Time within which 99 of 100 answers came."""
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)))] if ordered else math.inf

    @property
    def refused_share(self) -> float:
        """Of all pictures that came."""
        return self.refused / max(1, self.refused + len(self.latencies_s))

    def cost_per_million(self, price_per_hour: float) -> float:
        """Price of the servers' hours for each million answers."""
        return self.server_s / 3600 * price_per_hour / max(1, len(self.latencies_s)) * 1e6


@dataclass(frozen=True)
class Scaling:
    """The autoscaler's rules, as Kubernetes has them; see `read_scaling`."""

    least: int
    most: int
    queue_s: float
    busy_share: float
    grow_share: float
    grow_s: float
    calm_s: float
    shrink: int
    shrink_s: float
    start_s: float = 30.0


def read_scaling(path: Path = SCALING) -> Scaling:
    """Take the rules from the manifest, so that what is simulated is what runs."""
    import yaml

    spec = next(iter(yaml.safe_load_all(path.read_text(encoding="utf-8"))))["spec"]
    metrics: dict[str, Any] = {metric["type"]: metric for metric in spec["metrics"]}
    up, down = spec["behavior"]["scaleUp"], spec["behavior"]["scaleDown"]
    return Scaling(
        least=spec["minReplicas"],
        most=spec["maxReplicas"],
        queue_s=int(metrics["External"]["external"]["target"]["value"]) / 1000,
        busy_share=metrics["Resource"]["resource"]["target"]["averageUtilization"] / 100,
        grow_share=up["policies"][0]["value"] / 100,
        grow_s=up["policies"][0]["periodSeconds"],
        calm_s=down["stabilizationWindowSeconds"],
        shrink=down["policies"][0]["value"],
        shrink_s=down["policies"][0]["periodSeconds"],
    )


class Fleet:
    """The simulation: servers, the pictures in them, and the clock.

    Args:
        server: what each replica is.
        replicas: how many there are in the beginning.
        seed: of everything that is left to chance.
        spread: standard deviation of a batch's time, as a share of it.
    """

    def __init__(self, server: Server, replicas: int, seed: int = 0, spread: float = 0.2) -> None:
        self.server = server
        self.chance = random.Random(seed)
        self.spread = spread
        self.outcome = Outcome(most_servers=replicas)
        self.waiting: list[deque[float]] = []
        self.free: list[int] = []
        self.busy_s = 0.0
        self.serving: list[int] = []
        self.events: list[tuple[float, int, int, list[float]]] = []
        self._count = 0
        for _ in range(replicas):
            self.serving.append(self.add())

    def add(self) -> int:
        """Put one more server up, and say which; it gets pictures once it is among `serving`."""
        self.waiting.append(deque())
        self.free.append(self.server.workers)
        return len(self.free) - 1

    def arrive(self, now: float) -> None:
        """Give a picture to the less busy of two servers, as the front door does, or to the other when that is full."""
        two = [self.chance.choice(self.serving) for _ in range(2)]
        for i in sorted(two, key=lambda i: len(self.waiting[i]) - self.free[i]):
            if len(self.waiting[i]) < self.server.queue or self.free[i]:
                self.waiting[i].append(now)
                self.take(i, now)
                return
        self.outcome.refused += 1

    def take(self, i: int, now: float) -> None:
        """Let a free worker of a server begin what waits there."""
        if not self.free[i] or not self.waiting[i]:
            return
        size = min(self.server.batch, len(self.waiting[i]))
        batch = [self.waiting[i].popleft() for _ in range(size)]
        self.outcome.waits_s += [now - arrived for arrived in batch]
        mean_s = self.server.batch_s + size * self.server.picture_s
        took_s = mean_s * max(0.1, self.chance.gauss(1.0, self.spread)) if self.spread else mean_s
        self.busy_s += took_s
        self.free[i] -= 1
        self._count += 1
        heapq.heappush(self.events, (now + took_s, self._count, i, batch))

    def finish_until(self, now: float) -> None:
        """Answer everything that is done by then."""
        while self.events and self.events[0][0] <= now:
            done, _, i, batch = heapq.heappop(self.events)
            self.outcome.latencies_s += [done - arrived for arrived in batch]
            self.free[i] += 1
            self.take(i, done)


class Autoscaler:
    """Kubernetes' rule for more and fewer servers, applied to a fleet every `TICK_S`.

    Source: kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale, "Algorithm details".
    """

    def __init__(self, fleet: Fleet, rules: Scaling) -> None:
        self.fleet = fleet
        self.rules = rules
        self.starting: deque[tuple[float, int]] = deque()
        self._wanted: deque[tuple[float, int]] = deque()
        self._grown: deque[tuple[float, int]] = deque()
        self._shrunk_at = -math.inf
        self._seen_waits = 0
        self._seen_busy_s = 0.0

    @property
    def count(self) -> int:
        """Servers that are there or begin to be."""
        return len(self.fleet.serving) + len(self.starting)

    def tick(self, now: float) -> None:
        """Look, decide, and act within the rules."""
        fleet, rules = self.fleet, self.rules
        while self.starting and self.starting[0][0] <= now:
            fleet.serving.append(self.starting.popleft()[1])
        waits = fleet.outcome.waits_s[self._seen_waits :]
        self._seen_waits = len(fleet.outcome.waits_s)
        busy_s, self._seen_busy_s = fleet.busy_s - self._seen_busy_s, fleet.busy_s
        ratios = [
            (statistics.fmean(waits) if waits else 0.0) / rules.queue_s,
            busy_s / (TICK_S * fleet.server.workers * len(fleet.serving)) / rules.busy_share,
        ]
        wanted = max(math.ceil(self.count * r) if abs(r - 1) > _TOLERANCE else self.count for r in ratios)
        wanted = min(max(wanted, rules.least), rules.most)
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - rules.calm_s:
            self._wanted.popleft()
        if wanted > self.count:
            self._grow(wanted, now)
        elif max(w for _, w in self._wanted) < self.count and now >= self._shrunk_at + rules.shrink_s:
            for _ in range(min(rules.shrink, len(fleet.serving) - 1)):
                fleet.serving.pop()  # it answers what it has, and gets nothing more
            self._shrunk_at = now

    def _grow(self, wanted: int, now: float) -> None:
        while self._grown and self._grown[0][0] <= now - self.rules.grow_s:
            self._grown.popleft()
        before = self._grown[0][1] if self._grown else self.count
        allowed = min(wanted, math.ceil(before * (1 + self.rules.grow_share)))
        if allowed > self.count:
            self._grown.append((now, self.count))
        while self.count < allowed:
            self.starting.append((now + self.rules.start_s, self.fleet.add()))
        self.fleet.outcome.most_servers = max(self.fleet.outcome.most_servers, self.count)


def simulate(
    server: Server,
    rate: Callable[[float], float],
    peak: float,
    seconds: float,
    replicas: int,
    scaling: Scaling | None = None,
    seed: int = 0,
    spread: float = 0.2,
) -> Outcome:
    """Let pictures come for some time.

    Args:
        server: what each replica is.
        rate: pictures per second at a time in seconds.
        peak: at least the largest that `rate` gives.
        seconds: how long they come; what has begun is answered.
        replicas: how many servers there are, in the beginning where `scaling` is given.
        scaling: the autoscaler's rules; None leaves the number as it is.
        seed: of chance.
        spread: see `Fleet`.
    """
    fleet = Fleet(server, replicas, seed, spread)
    scaler = Autoscaler(fleet, scaling) if scaling else None
    now, next_tick = 0.0, TICK_S
    while True:
        now += fleet.chance.expovariate(peak)
        while next_tick <= min(now, seconds):
            fleet.finish_until(next_tick)
            if scaler:
                scaler.tick(next_tick)
            fleet.outcome.server_s += TICK_S * (scaler.count if scaler else replicas)
            next_tick += TICK_S
        if now > seconds:
            break
        fleet.finish_until(now)
        if fleet.chance.random() * peak < rate(now):
            fleet.arrive(now)
    fleet.outcome.server_s += (seconds - next_tick + TICK_S) * (scaler.count if scaler else replicas)
    fleet.finish_until(math.inf)
    return fleet.outcome


def smallest_fleet(server: Server, rate: float, p99_s: float, seconds: float = 120.0) -> tuple[int, Outcome]:
    """Fewest servers that answer a steady stream in time and refuse less than one in a thousand."""
    replicas = max(1, math.ceil(rate / server.most_per_s))
    while True:
        outcome = simulate(server, lambda _: rate, rate, max(seconds, 5_000 / rate), replicas)
        if outcome.p99_s <= p99_s and outcome.refused_share < 0.001:
            return replicas, outcome
        replicas = max(replicas + 1, math.ceil(replicas * 1.02))
        if replicas > 4 * rate / server.most_per_s + 8:  # a picture alone takes longer than is allowed
            return replicas, outcome


def one_day(rate: float, hours: float = 24.0) -> Callable[[float], float]:
    """Rate over a day squeezed into `hours`: a third of `rate` at night, `rate` at noon, and a burst of twice that."""

    def at(now: float) -> float:
        share = now / (hours * 3600)
        burst = 2.0 if 0.6 <= share < 0.6 + 300 / (hours * 3600) else 1.0
        return burst * rate * (1 / 3 + 2 / 3 * math.sin(math.pi * share) ** 2)

    return at
