"""Prometheus' rules and Grafana's dashboard: what they ask for exists, is understood, and has data behind it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from marten.files import ROOT
from marten.readiness import Address, free_ports, request
from tests.pictures import odd_pictures
from tests.servers import Serve, wait_until
from tests.test_served import archive, server

__all__ = ["archive", "server"]  # fixtures

METRICS = ROOT / "deployment" / "metrics"
RULES = yaml.safe_load((METRICS / "rules.yml").read_text(encoding="utf-8"))["groups"]
DASHBOARD = json.loads((METRICS / "grafana" / "dashboards" / "marten.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
NEEDS_MORE = ("GPU", "envoy_", "explain", "label_drift", "expected_share")
"""What has no data behind a TorchServe alone, on a processor, whose model's card tells of no training set."""


def find_program(name: str) -> str:
    """Path of promtool or prometheus, from the folder MARTEN_PROMETHEUS or the PATH."""
    found = shutil.which(name, path=os.environ.get("MARTEN_PROMETHEUS") or None)
    if found is None:
        pytest.skip(f"needs {name}: on the PATH, or in the folder that MARTEN_PROMETHEUS names")
    return found


def filled_in(query: str) -> str:
    """A dashboard's query as Grafana would send it for every model and the last minute."""
    return query.replace("$model", ".*").replace("$__rate_interval", "1m")


def promtool(*words: str | Path) -> None:
    done = subprocess.run([find_program("promtool"), *map(str, words)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_config_and_its_rules() -> None:
    promtool("check", "config", METRICS / "prometheus.yml")


def test_each_alert_is_raised_by_what_it_is_for() -> None:
    promtool("test", "rules", METRICS / "rules_test.yml")
    tested = (METRICS / "rules_test.yml").read_text(encoding="utf-8")
    alerts = [rule["alert"] for group in RULES for rule in group["rules"] if "alert" in rule]
    assert len(alerts) >= 10
    assert [name for name in alerts if f'alertname="{name}"' not in tested] == []


def test_promtool_reads_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}", "expr": filled_in(query)} for i, (_, query) in enumerate(QUERIES)]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
    promtool("check", "rules", file)


def test_every_metric_that_is_asked_for_is_told_by_somebody() -> None:
    import ts

    own = set(re.findall(r'"(marten_\w+)"', (ROOT / "telemetry.py").read_text(encoding="utf-8")))
    listed = yaml.safe_load((Path(ts.__file__).parent / "configs" / "metrics.yaml").read_text(encoding="utf-8"))
    torchserves = {metric["name"] for kinds in listed["ts_metrics"].values() for metric in kinds}
    rules = [rule for group in RULES for rule in group["rules"]]
    known = own | torchserves | {"up"} | {rule["record"] for rule in rules if "record" in rule}
    for where, query in [*QUERIES, *((str(rule), rule["expr"]) for rule in rules)]:
        names = re.findall(r"\b(?:marten[_:]|ts_|Requests\d|Worker|CPU|GPU|Memory)[\w:]+", query)
        asked = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
        assert asked or "up{" in query or "envoy_" in query, where
        assert asked <= known, where
    told = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in own if f"`{name}`" not in told] == []


def test_panels_explain_themselves_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_alert_says_what_to_do() -> None:
    for rule in (rule for group in RULES for rule in group["rules"] if "alert" in rule):
        assert rule["labels"]["severity"] in ("page", "warn")
        assert set(rule["annotations"]) == {"summary", "action"}


@pytest.fixture
def prometheus(server: Serve, tmp_path: Path) -> Iterator[Address]:
    """A real Prometheus with our rules, that asks a real TorchServe every second."""
    program = find_program("prometheus")
    config = yaml.safe_load((METRICS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(METRICS / "rules.yml")]
    targets = [{"targets": [f"127.0.0.1:{server.ports[2]}"]}]
    config["scrape_configs"] = [{"job_name": "torchserve", "static_configs": targets}]
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    address = Address("127.0.0.1", free_ports(1)[0])
    listen = f"--web.listen-address={address.host}:{address.port}"
    words = [program, f"--config.file={file}", f"--storage.tsdb.path={tmp_path / 'data'}", listen]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        wait_until(lambda: is_ready(address), 60)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def is_ready(address: Address) -> bool:
    try:
        return request(address, "GET", "/-/ready")[0] == 200
    except OSError:
        return False


def query(prometheus: Address, text: str) -> list[dict[str, Any]]:
    status, body = request(prometheus, "GET", "/api/v1/query?" + urllib.parse.urlencode({"query": text}))
    assert status == 200, body
    return list(json.loads(body)["data"]["result"])


@pytest.mark.server
def test_every_panel_has_data_behind_it(prometheus: Address, server: Serve) -> None:
    pictures = [*list(odd_pictures().values())[:6], b"no picture"]
    deadline = time.monotonic() + 90
    empty = QUERIES
    while empty and time.monotonic() < deadline:
        for body in pictures:
            server.ask("pets", body)
        time.sleep(1)
        asked = [(title, text) for title, text in QUERIES if not any(word in text for word in NEEDS_MORE)]
        empty = [(title, text) for title, text in asked if not query(prometheus, filled_in(text))]
    assert empty == []
    (queue,) = query(prometheus, 'marten:queue_seconds:mean5m{model_name="pets"}')
    assert 0 <= float(queue["value"][1]) < 10
    (refused,) = query(prometheus, 'marten:refused_share:rate5m{ModelName="pets"}')
    assert float(refused["value"][1]) == pytest.approx(1 / 7, abs=0.08)
    assert query(prometheus, 'ALERTS{alertstate="firing"}') == []


def test_compose_mounts_what_is_there() -> None:
    services = yaml.safe_load((ROOT / "deployment" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for name in ("prometheus", "grafana"):
        sources = [volume.split(":")[0] for volume in services[name]["volumes"]]
        assert [s for s in sources if s.startswith(".") and not (ROOT / "deployment" / s).exists()] == []
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
