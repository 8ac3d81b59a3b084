"""Kubernetes' manifests: valid by its own schemas, in step with images, proxy and metrics, and as closed as can be."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from marten.files import ROOT

KUBERNETES = ROOT / "deployment" / "kubernetes"
FILES = sorted(p for p in (KUBERNETES / "base").glob("*.yaml") if p.name != "kustomization.yaml")
VERSIONS = ("1.30", "1.33", "1.37")
DRAIN_S = 20
"""How long scripts/serve waits for the last answers, unless --drain_s says otherwise."""


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


BASE = [document for path in FILES for document in documents(path)]
KSERVE = documents(KUBERNETES / "kserve.yaml")[0]


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in BASE if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def pods() -> list[tuple[str, dict[str, Any]]]:
    found = [(d["metadata"]["name"], d["spec"]["template"]["spec"]) for d in BASE if d["kind"] == "Deployment"]
    return [*found, ("kserve", KSERVE["spec"]["predictor"])]


def validate(document: dict[str, Any], version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: requirements-dev.txt")
    validator.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_own_schemas_accept_every_manifest(version: str) -> None:
    for document in BASE:
        validate(document, version)
    predictor = {key: KSERVE["spec"]["predictor"][key] for key in ("containers", "volumes")}
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "kserve"}, "spec": predictor}, version)


def test_a_wrong_word_is_found() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: requirements-dev.txt")
    wrong = {**named("Deployment", "server")}
    wrong["spec"] = {**wrong["spec"], "replica": 2}
    with pytest.raises(validator.ValidationError):
        validate(wrong, VERSIONS[-1])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, for kustomize")
@pytest.mark.parametrize("folder", ["base", "gpu"])
def test_kustomize_puts_them_together(folder: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / folder)], capture_output=True, text=True, timeout=120
    )
    if "unknown command" in done.stderr:
        pytest.skip("this kubectl is too old to have kustomize")
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    assert len(made) == len(BASE)
    for document in made:
        validate(document, VERSIONS[-1])
        assert document["metadata"]["namespace"] == "marten"
    (server,) = [d for d in made if (d["kind"], d["metadata"]["name"]) == ("Deployment", "server")]
    (container,) = server["spec"]["template"]["spec"]["containers"]
    assert container["image"].endswith("marten-serve:0.1.0")
    assert (container["resources"]["limits"].get("nvidia.com/gpu") == 1) == (folder == "gpu")


@pytest.mark.parametrize(("name", "pod"), pods())
def test_pods_are_closed_where_they_can_be(name: str, pod: dict[str, Any]) -> None:
    for container in pod["containers"]:
        security = {**pod.get("securityContext", {}), **container["securityContext"]}
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == 1000
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert "cpu" in container["resources"]["requests"]
        assert "memory" in container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    if name != "kserve":
        assert pod["automountServiceAccountToken"] is False


def test_a_pod_that_ends_has_time_to_answer() -> None:
    pod = named("Deployment", "server")["spec"]["template"]["spec"]
    pause_s = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause_s + DRAIN_S + 5
    assert re.search(rf'"--drain_s", type=float, default={DRAIN_S}\.0', (ROOT / "scripts" / "serve").read_text("utf-8"))


def test_selectors_and_ports_fit_each_other() -> None:
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        for document in (d for d in BASE if d["kind"] == kind and d["metadata"]["name"] != "nobody"):
            name = document["metadata"]["name"]
            template = named("Deployment", name)["spec"]["template"]
            chosen = document["spec"].get("selector") or document["spec"]["podSelector"]
            assert (chosen.get("matchLabels") or chosen).items() <= template["metadata"]["labels"].items()
            ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
            if kind == "Service":
                assert {port["targetPort"] for port in document["spec"]["ports"]} <= ports
            if kind == "NetworkPolicy":
                assert {p["port"] for rule in document["spec"]["ingress"] for p in rule["ports"]} <= ports


def test_servers_have_no_way_out_and_only_the_door_asks_them() -> None:
    nobody, server = named("NetworkPolicy", "nobody")["spec"], named("NetworkPolicy", "server")["spec"]
    assert (nobody["podSelector"], set(nobody["policyTypes"])) == ({}, {"Ingress", "Egress"})
    assert "egress" not in server
    asked = [rule["from"] for rule in server["ingress"] if {"port": "pictures"} in rule["ports"]]
    assert asked == [[{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "door"}}}]]
    listed = [d["spec"]["type"] for d in BASE if d["kind"] == "Service" and "type" in d["spec"]]
    assert listed == ["LoadBalancer"]  # the door's


def test_the_doors_own_settings_find_the_servers() -> None:
    """The image's replicas.yaml asks the name `server`, and envoy.yaml the files that the secret is made of."""
    proxy = ROOT / "deployment" / "proxy"
    assert "address: server, port_value: 8080" in (proxy / "replicas.yaml").read_text(encoding="utf-8")
    service = named("Service", "server")["spec"]
    assert (service["clusterIP"], service["ports"][0]["port"]) == ("None", 8080)
    container = named("Deployment", "door")["spec"]["template"]["spec"]["containers"][0]
    ports = {port["containerPort"] for port in container["ports"]}
    settings = (proxy / "envoy.yaml").read_text(encoding="utf-8")
    assert all(f"port_value: {port}" in settings for port in ports)
    secret = re.findall(r"--from-file=(\S+)", (KUBERNETES / "base" / "kustomization.yaml").read_text(encoding="utf-8"))
    assert {f"/etc/envoy/secrets/{name}" for name in secret} == set(
        re.findall(r"/etc/envoy/secrets/[\w.]+\w", settings)
    )


def test_the_autoscaler_reads_what_the_adapter_offers() -> None:
    (metric,) = [m for m in named("HorizontalPodAutoscaler", "server")["spec"]["metrics"] if m["type"] == "External"]
    values = yaml.safe_load((KUBERNETES / "adapter-values.yaml").read_text(encoding="utf-8"))
    (rule,) = values["rules"]["external"]
    assert metric["external"]["metric"]["name"] == rule["name"]["as"]
    assert "ts_queue_latency_microseconds" in rule["metricsQuery"]
