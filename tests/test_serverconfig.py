"""Archives, ports and properties, without a server."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from marten import serverconfig
from marten.errors import ServerError, UsageError
from marten.fitting import fit_shared_cores, fit_threads, fit_workers
from marten.java import Java
from marten.runtime import Running, find_running, locked, runtime_folder
from marten.server import command, environment
from marten.serverconfig import CONFIG, find_archives, parse_properties, read_addresses, read_properties, read_settings
from tests.servers import build_archive


def ports(addresses: dict) -> list[int]:
    return [addresses[name].port for name in ("inference", "management", "metrics")]


def test_archives_are_named_after_their_files_or_as_one_likes(tmp_path: Path) -> None:
    build_archive(tmp_path, "vgg")
    build_archive(tmp_path, "base_cnn")
    (tmp_path / ".half.mar").write_bytes(b"")
    assert find_archives([], tmp_path) == {"base_cnn": "base_cnn.mar", "vgg": "vgg.mar"}
    assert find_archives(["vgg", "base_cnn.mar"], tmp_path) == {"vgg": "vgg.mar", "base_cnn": "base_cnn.mar"}
    assert find_archives(["dogs=vgg.mar"], tmp_path) == {"dogs": "vgg.mar"}


def test_archives_that_are_missing_or_broken_are_told(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"no \.mar in .*: build one with scripts/archive"):
        find_archives([], tmp_path)
    build_archive(tmp_path, "vgg")
    with pytest.raises(ServerError, match=r"cnn: no cnn\.mar in .*; there are vgg\.mar"):
        find_archives(["cnn"], tmp_path)
    whole = (tmp_path / "vgg.mar").read_bytes()
    for broken in (b"", b"not a zip", whole[:300]):
        (tmp_path / "cut.mar").write_bytes(broken)
        with pytest.raises(ServerError, match=r"cut: .* is no readable \.mar"):
            find_archives(["cut"], tmp_path)


def test_ports_follow_the_first_one_given() -> None:
    assert ports(read_addresses(CONFIG, {})) == [8080, 8081, 8082]
    assert ports(read_addresses(CONFIG, {"inference": 9090})) == [9090, 9091, 9092]
    assert ports(read_addresses(CONFIG, {"inference": 9090, "metrics": 9000})) == [9090, 9091, 9000]
    with pytest.raises(UsageError, match="ports repeat"):
        read_addresses(CONFIG, {"management": 8080})


def test_a_container_s_address_is_asked_on_loopback(tmp_path: Path) -> None:
    config = tmp_path / "config.properties"
    config.write_text("inference_address=http://0.0.0.0:8080\ndisable_token_authorization=true\n")
    assert read_addresses(config, {})["inference"].url == "http://127.0.0.1:8080"
    build_archive(tmp_path, "vgg")
    assert "inference_address=http://0.0.0.0:9090\n" in read_settings([], tmp_path, config, {"inference": 9090}).config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("inference_address=https://127.0.0.1:8443\ndisable_token_authorization=true", "must read http://HOST:PORT"),
        ("disable_token_authorization=false", "keeps TorchServe's tokens on"),
    ],
)
def test_a_config_that_cannot_be_asked_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.properties").write_text(text)
    build_archive(tmp_path, "vgg")
    with pytest.raises(UsageError, match=says):
        read_settings([], tmp_path, tmp_path / "config.properties")


def test_flags_stand_behind_the_config_and_change_the_fingerprint(tmp_path: Path) -> None:
    build_archive(tmp_path, "vgg")
    plain, changed = read_settings([], tmp_path), read_settings([], tmp_path, workers=3, number_of_gpu=0)
    (tmp_path / "config.properties").write_text(changed.config)
    properties = read_properties(tmp_path / "config.properties")
    assert (properties["default_workers_per_model"], properties["number_of_gpu"]) == ("3", "0")
    assert plain.fingerprint() != changed.fingerprint()
    before = plain.fingerprint()
    os.utime(tmp_path / "vgg.mar", ns=(1, 1))
    assert plain.fingerprint() != before


@pytest.mark.parametrize(
    ("models", "cores", "memory_gb", "workers", "threads"),
    [
        (1, 1, 64, 1, 1),
        (1, 2, 64, 2, 1),
        (2, 2, 64, 1, 1),
        (4, 2, 64, 1, 1),
        (1, 2, 2, 1, 2),
        (1, 16, 64, 8, 2),
        (3, 16, 64, 5, 1),
        (2, 64, 64, 8, 4),
        (9, 4, 1, 1, 1),
    ],
)
def test_workers_and_threads_fill_the_cores_and_no_more(
    models: int, cores: int, memory_gb: int, workers: int, threads: int
) -> None:
    assert fit_workers(models, cores, memory_gb * 10**9) == workers
    assert fit_threads(models * workers, cores) == threads
    assert models * workers * threads <= max(cores, models)


def test_auto_workers_stand_behind_the_config_and_threads_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_archive(tmp_path, "vgg")
    monkeypatch.setattr(serverconfig, "has_gpu", lambda: False)
    monkeypatch.setattr(serverconfig, "available_cores", lambda: 4)
    monkeypatch.setattr(serverconfig, "available_memory", lambda: 10**12)
    one = read_settings([], tmp_path)
    assert parse_properties(one.config)["default_workers_per_model"] == "4"
    assert (one.workers, one.threads) == (None, 1), "an archive's own minWorkers must win over auto"
    assert read_settings([], tmp_path, workers=2).threads == 2
    build_archive(tmp_path, "base_cnn")
    assert parse_properties(read_settings([], tmp_path).config)["default_workers_per_model"] == "2"
    monkeypatch.setattr(serverconfig, "has_gpu", lambda: True)
    assert "from the command line" in read_settings([], tmp_path).config
    assert "default_workers" not in read_settings([], tmp_path).config.partition("from the command line")[2]
    java = Java(Path("/usr/bin/java"), "17", "PATH")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment(java, tmp_path, 3, 4)["OMP_NUM_THREADS"] == "3"
    assert environment(java, tmp_path, 3, 4)["MARTEN_CORES"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environment(java, tmp_path, 3)["OMP_NUM_THREADS"] == "5"


def test_more_models_than_cores_share_no_core() -> None:
    assert [fit_shared_cores(models, 2) for models in (1, 2, 3)] == [2, 2, 1]


def test_the_laptop_s_config_opens_nothing() -> None:
    """B1-15 again: what deployment/config.properties says, word by word."""
    said = read_properties(CONFIG)
    addresses = {value for key, value in said.items() if key.endswith("_address")}
    assert all(value.removeprefix("http://").startswith("127.0.0.1") for value in addresses)
    assert (said["enable_model_api"], said["allowed_urls"]) == ("false", "^$")
    assert int(said["max_request_size"]) == 16 << 20
    assert int(said["default_response_timeout"]) <= 10


def test_the_server_sees_this_interpreter_and_no_foreign_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("TS_CONFIG_FILE", "/elsewhere")
    monkeypatch.setenv("JAVA_HOME", "/old")
    seen = environment(Java(Path("/usr/bin/java"), "17", "PATH"), tmp_path)
    assert not {"PYTHONPATH", "TS_CONFIG_FILE", "JAVA_HOME"} & set(seen)
    assert seen["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert seen["TEMP"] == seen["TMPDIR"] == str(tmp_path / "temp")
    build_archive(tmp_path, "vgg")
    words = command(read_settings(["dogs=vgg.mar"], tmp_path), tmp_path)
    assert words[:3] == [sys.executable, "-m", "ts.model_server"]
    assert words[-2:] == ["--models", "dogs=vgg.mar"]


def test_the_private_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARTEN_RUNTIME", str(tmp_path))
    folder = runtime_folder(9090)
    with locked(folder):
        assert folder.stat().st_mode & 0o777 == 0o700
        with pytest.raises(ServerError, match="another scripts/serve is at work"), locked(folder):
            pass
    folder.chmod(0o755)
    with pytest.raises(ServerError, match="not a private folder of yours"), locked(folder):
        pass
    monkeypatch.setenv("MARTEN_RUNTIME", str(tmp_path / ("long" * 25)))
    with pytest.raises(ServerError, match="too long a path for TorchServe's sockets"), locked(runtime_folder(9090)):
        pass


def test_a_dead_server_s_state_is_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARTEN_RUNTIME", str(tmp_path))
    assert find_running(9090) is None
    state = {"models": ["vgg"], "addresses": {"inference": ["127.0.0.1", 9090]}, "fingerprint": {"archives": {}}}
    folder = runtime_folder(9090)
    folder.mkdir()
    for pid, created in ((2**22 + 1, 0.0), (os.getpid(), 1.0)):  # no such process; ours, but born at another time
        (folder / "state.json").write_text(json.dumps({**state, "pid": pid, "created": created, "java": "Java 17"}))
        assert find_running(9090) is None


def test_a_restart_takes_the_same_models(tmp_path: Path) -> None:
    archives = {"archives": {"dogs": [str(tmp_path / "vgg.mar"), 1, 1]}}
    assert Running(tmp_path, 1, ("dogs",), {}, archives, "Java 17").model_words() == ["dogs=vgg.mar"]


def test_java_is_modest_where_cores_are_few_and_its_owner_said_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_archive(tmp_path, "m")
    monkeypatch.setattr(serverconfig, "has_gpu", lambda: False)
    monkeypatch.setattr(serverconfig, "available_cores", lambda: 2)
    ours = parse_properties(read_settings([], tmp_path).config)["vmargs"]
    assert ours == parse_properties(CONFIG.read_text())["vmargs"] + " -XX:+UseSerialGC -XX:TieredStopAtLevel=1"
    own = tmp_path / "config.properties"
    own.write_text(CONFIG.read_text() + "vmargs=-XX:+UseG1GC\n")
    assert parse_properties(read_settings([], tmp_path, own).config)["vmargs"] == "-XX:+UseG1GC"
    monkeypatch.setattr(serverconfig, "available_cores", lambda: 16)
    assert "TieredStopAtLevel" not in read_settings([], tmp_path).config
