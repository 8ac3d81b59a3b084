"""The simulation of servers agrees with the theory of queues, and its autoscaler with Kubernetes' rules."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest

from marten.bench.scale import (
    Autoscaler,
    Fleet,
    Outcome,
    Scaling,
    Server,
    one_day,
    read_scaling,
    simulate,
    smallest_fleet,
)
from marten.files import ROOT

ONE = Server(workers=1, batch=1, queue=10**6, picture_s=0.01)
RULES = Scaling(
    least=1, most=8, queue_s=0.2, busy_share=0.8, grow_share=1.0, grow_s=30, calm_s=300, shrink=1, shrink_s=60
)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_waits_are_those_of_one_queue_with_equal_times(load: float) -> None:
    """M/D/1: the mean wait is load x time / (2 (1 - load)). Source: Pollaczek 1930, Khinchine 1932."""
    outcome = simulate(ONE, lambda _: load / 0.01, load / 0.01, 1500, 1, spread=0)
    assert statistics.fmean(outcome.waits_s) == pytest.approx(load * 0.01 / (2 * (1 - load)), rel=0.06)
    assert outcome.refused == 0


def test_what_is_too_much_is_refused() -> None:
    small = Server(workers=2, batch=4, queue=8, picture_s=0.01)
    outcome = simulate(small, lambda _: 400.0, 400.0, 100, 1, spread=0)
    assert outcome.refused_share == pytest.approx(1 - small.most_per_s / 400, abs=0.02)
    assert max(outcome.latencies_s) <= (8 / 8 + 2) * 4 * 0.01 + 1e-9  # the queue, a batch begun before it, and its own


def test_every_picture_is_answered_or_refused_once() -> None:
    fleet = Fleet(Server(workers=2, batch=3, queue=5, picture_s=0.01), 3)
    for i in range(5000):
        fleet.finish_until(i * 0.001)
        fleet.arrive(i * 0.001)
    fleet.finish_until(float("inf"))
    assert len(fleet.outcome.latencies_s) + fleet.outcome.refused == 5000
    assert fleet.outcome.refused > 0
    assert fleet.free == [2, 2, 2]


def test_batches_help_where_a_batch_costs_more_than_its_pictures() -> None:
    gpu = Server(workers=1, batch=32, queue=64, picture_s=0.0005, batch_s=0.008)
    assert gpu.most_per_s == pytest.approx(32 / 0.024)
    assert smallest_fleet(gpu, 1000, 0.5, seconds=20)[0] == 1
    assert smallest_fleet(Server(1, 1, 64, 0.0005, 0.008), 1000, 0.5, seconds=20)[0] > 8


def test_the_cost_is_hours_times_price() -> None:
    outcome = Outcome(latencies_s=[0.1] * 1000, server_s=7200)
    assert outcome.cost_per_million(0.5) == pytest.approx(2 * 0.5 / 1000 * 1e6)
    steady = simulate(ONE, lambda _: 50.0, 50.0, 100, 3)
    assert steady.server_s == pytest.approx(300)


def test_the_fewest_servers_are_the_fewest() -> None:
    server = Server(workers=2, batch=8, queue=64, picture_s=0.03)
    count, outcome = smallest_fleet(server, 300, 0.3, seconds=30)
    assert outcome.p99_s <= 0.3
    fewer = simulate(server, lambda _: 300.0, 300.0, 30, count - 1)
    assert fewer.p99_s > 0.3 or fewer.refused_share >= 0.001


def test_the_autoscaler_doubles_at_most_and_takes_away_slowly() -> None:
    fleet = Fleet(Server(workers=1, batch=1, queue=10**6, picture_s=0.1), 1)
    scaler = Autoscaler(fleet, RULES)
    counts = []
    for tick in range(1, 61):
        now = tick * 15.0
        fleet.finish_until(now)
        if tick <= 8:
            fleet.outcome.waits_s += [10.0]  # far over the 0.2 s that are aimed at
        scaler.tick(now)
        counts.append(scaler.count)
    assert counts[:6] == [2, 2, 4, 4, 8, 8], "doubled every 30 s"
    assert max(counts) == 8
    calm_from = next(i for i, count in enumerate(counts) if i > 8 and count < 8)
    assert (calm_from - 8) * 15 >= 300 - 15
    later = counts[calm_from:]
    assert all(later[i] - later[i + 4] <= 1 for i in range(len(later) - 4)), "one a minute"
    assert len(fleet.serving) < 8


def test_the_manifests_rules_hold_a_day_with_a_burst() -> None:
    rules = read_scaling()
    assert (rules.least, rules.queue_s, rules.grow_share) == (2, 0.2, 1.0)
    server = Server(workers=2, batch=8, queue=64, picture_s=0.06)
    outcome = simulate(server, one_day(60, 1.5), 120, 5400, rules.least, rules)
    assert outcome.refused_share < 0.02
    assert 3 < outcome.most_servers <= rules.most
    assert outcome.server_s < outcome.most_servers * 5400 * 0.8


def test_the_command_prints_both_tables() -> None:
    words = ["--cpu_ms", "30", "--rates", "20", "--day", "20", "--price", "0.2"]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    command = [sys.executable, str(ROOT / "scripts" / "scale")]
    told = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120, env=environment)
    assert told.returncode == 0, told.stderr
    assert "at most 66.7 pictures a second" in told.stdout
    assert "| 20 | 1 | 30% |" in told.stdout
    assert "| autoscaled | " in told.stdout
    missing = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (missing.returncode, "--measure" in missing.stderr) == (2, True)
