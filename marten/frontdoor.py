"""The front door's settings: deployment/proxy's files, with the places, ports, models and replicas at hand put in.

What the door does stands in those files. Here they are only filled in: one route, one cluster and one health check for
each model, so that a slow model cannot take the turns of a fast one, and `/ready` speaks for all of them.
"""

from __future__ import annotations

import copy
import ipaddress
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marten.credentials import keys_text
from marten.errors import ServerError, UsageError
from marten.files import ROOT, write_text
from marten.readiness import Address

PROXY = ROOT / "deployment" / "proxy"
PAGE = ROOT / "deployment" / "web"


@dataclass(frozen=True)
class Door:
    """How a front door stands to the world.

    Attributes:
        address: where it listens.
        secrets: folder of tls.crt, tls.key and keys.yaml; None, on loopback alone, listens in plain HTTP to everybody.
        in_flight: pictures of one model under way at once, in all replicas together; the next is refused.
        per_second: requests that one address may make; twice as many at once.
        explanations: whether heat maps are offered, at three times the cost of an answer.
        metrics_port: of 127.0.0.1, for Prometheus; None where nobody asks.
        collector: of OpenTelemetry spans, by HTTP; None where there is none.
    """

    address: Address
    secrets: Path | None
    in_flight: int = 16
    per_second: int = 100
    explanations: bool = False
    metrics_port: int | None = None
    collector: Address | None = None

    def __post_init__(self) -> None:
        if self.secrets is None and not is_loopback(self.address.host):
            raise UsageError(
                f"{self.address.host}:{self.address.port} can be reached from the network, which takes TLS and a key: "
                "name their folder with --secrets (what is missing there is made), or expose 127.0.0.1 alone"
            )

    @property
    def url(self) -> str:
        """As this machine's own callers write it."""
        host = "localhost" if is_loopback(self.address.host) or is_any(self.address.host) else self.address.host
        return f"{'https' if self.secrets else 'http'}://{f'[{host}]' if ':' in host else host}:{self.address.port}"


def parse_address(text: str, flag: str = "--expose") -> Address:
    """ADDRESS:PORT, [IPv6]:PORT, or a PORT of 127.0.0.1.

    Args:
        text: what was given.
        flag: by which.

    Raises:
        UsageError: neither of them.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    host = "127.0.0.1" if host == "localhost" else host
    try:
        ipaddress.ip_address(host)
        if not 0 < int(port) < 65536:
            raise ValueError
    except ValueError:
        raise UsageError(f"{flag} {text}: give ADDRESS:PORT, as 0.0.0.0:8443, or a PORT of 127.0.0.1") from None
    return Address(host, int(port))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; of names that is sure of localhost alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_any(host: str) -> bool:
    """Whether it stands for every address of this machine."""
    return ipaddress.ip_address(host).is_unspecified


def write_config(door: Door, models: Sequence[str], replicas: Sequence[Address], folder: Path) -> Path:
    """Write everything that Envoy reads into a private folder; returns the file to start it with."""
    secrets = door.secrets or folder
    if door.secrets is None:
        write_text(secrets / "keys.yaml", keys_text([]))
    places = {"/etc/envoy/secrets": secrets.resolve(), "/etc/envoy": folder, "/srv/web": PAGE}
    places["/tmp/envoy-admin.sock"] = folder / "admin.sock"
    config = _read(PROXY / "envoy.yaml", places)
    listeners = config["static_resources"]["listeners"]
    _set_address(listeners[0], door.address)
    if door.metrics_port is None:
        del listeners[1]
    else:
        _set_address(listeners[1], Address("127.0.0.1", door.metrics_port))
    chain = listeners[0]["filter_chains"][0]
    if door.secrets is None:
        del chain["transport_socket"], chain["transport_socket_connect_timeout"]
    manager = chain["filters"][0]["typed_config"]
    if door.collector is not None:
        traced = _read(PROXY / "tracing.yaml", {})
        manager["tracing"] = traced["tracing"]
        place = traced["cluster"]["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
        place["socket_address"] = _socket(door.collector)
        config["static_resources"]["clusters"].append(traced["cluster"])
    host = manager["route_config"]["virtual_hosts"][0]
    host["routes"] = _routes(host["routes"], door, models)
    for each in manager["http_filters"]:
        if each["name"] == "envoy.filters.http.health_check":
            each["typed_config"]["cluster_min_healthy_percentages"] = {name: {"value": 1} for name in models}
        if each["name"] == "envoy.filters.http.local_ratelimit":
            bucket = each["typed_config"]["descriptors"][0]["token_bucket"]
            bucket |= {"max_tokens": 2 * door.per_second, "tokens_per_fill": door.per_second}
    cluster = _read(PROXY / "replicas.yaml", {})["resources"][0]
    clusters = [_cluster(cluster, name, door, folder) for name in models]
    write_text(folder / "replicas.yaml", json.dumps({"version_info": "0", "resources": clusters}))
    set_replicas(folder, models, replicas)
    write_text(folder / "envoy.json", json.dumps(config, indent=1))
    return folder / "envoy.json"


def set_replicas(folder: Path, models: Sequence[str], replicas: Sequence[Address]) -> None:
    """Name the TorchServes behind the door; a running one reads it at once, and loses no request over it."""
    endpoints = [{"endpoint": {"address": {"socket_address": _socket(address)}}} for address in replicas]
    kind = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
    told = [{"@type": kind, "cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]} for name in models]
    write_text(folder / "endpoints.json", json.dumps({"resources": told}))


def _routes(routes: Sequence[Mapping[str, Any]], door: Door, models: Sequence[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for route in map(copy.deepcopy, routes):
        prefix = route["match"].get("path_separated_prefix")
        path = route["match"].get("path")
        if route.get("name") == "explanations" and not door.explanations:
            continue
        route["match"].pop("runtime_fraction", None)
        if route.get("route", {}).get("cluster") == "torchserve" and prefix:
            for name in models:
                mine = copy.deepcopy(dict(route))
                mine["match"]["path_separated_prefix"] = f"{prefix}/{name}"
                mine["route"]["cluster"] = name
                found.append(mine)
            continue
        if path == "/ping":
            route["route"]["cluster"] = models[0]
        if path == "/models.json":
            route["direct_response"]["body"] = {"inline_string": json.dumps({"models": list(models)})}
        found.append(dict(route))
    return found


def _cluster(pattern: Mapping[str, Any], name: str, door: Door, folder: Path) -> dict[str, Any]:
    cluster = {**copy.deepcopy(dict(pattern)), "name": name, "type": "EDS"}
    del cluster["load_assignment"]
    cluster["eds_cluster_config"] = {"eds_config": {"path_config_source": {"path": str(folder / "endpoints.json")}}}
    cluster["circuit_breakers"]["thresholds"][0]["max_requests"] = door.in_flight
    cluster["health_checks"][0]["http_health_check"]["path"] = f"/predictions/{name}"
    return cluster


def _read(path: Path, places: Mapping[str, Path]) -> Any:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ServerError(f"no {path}: {error.strerror}") from error
    for ours, theirs in places.items():
        text = text.replace(ours, str(theirs))
    return yaml.safe_load(text)


def _set_address(listener: dict[str, Any], address: Address) -> None:
    listener["address"] = {"socket_address": _socket(address)}


def _socket(address: Address) -> dict[str, Any]:
    return {"address": address.host, "port_value": address.port}
