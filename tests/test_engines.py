"""Engines: they agree with the network they were made of, give way to the next where they do not, and share cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import engines
from engines import choose_engine, count_workers, cpu_has_bf16, drawn_pixels, fit_threads, plans
from marten.architectures import build_network
from modelspec import ModelCard, ModelSpec, load_state_dict
from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    """Leave torch's global settings as they were."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.fixture
def loaded(tiny_model: Callable[..., Path]) -> Callable[..., tuple[torch.nn.Module, ModelSpec]]:
    def load(conv_net: str, **fields: Any) -> tuple[torch.nn.Module, ModelSpec]:
        weights = tiny_model(conv_net, **fields)
        spec = ModelCard.read(weights.with_suffix(".json")).spec
        network = build_network(spec.arch, spec.arch_args)
        network.load_state_dict(load_state_dict(weights))
        return network.eval(), spec

    return load


def settings(precision: str = "fp32", engine: str = "auto") -> dict[str, str]:
    return {"precision": precision, "engine": engine}


@pytest.mark.parametrize("conv_net", ["base_cnn", "resnet18", "efficientnet_lite0"])
@pytest.mark.parametrize("build", [engines.build_torch, engines.build_openvino])
def test_an_engine_in_fp32_gives_what_the_network_gives(loaded: Any, conv_net: str, build: Any) -> None:
    if build is engines.build_openvino:
        pytest.importorskip("openvino")
    network, spec = loaded(conv_net)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    engine = build(network, spec.preprocess.size_px, "fp32", 1)
    pixels_NHWC = torch.cat([drawn_pixels(spec.preprocess.size_px).flip(i) for i in (0, 1, 2)])
    images_NCHW = spec.preprocess.normalize(pixels_NHWC)
    with torch.inference_mode():
        wanted_NK = spec.logits(network, images_NCHW)
        for rows in (slice(0, 1), slice(1, 6), slice(2, 3)):  # batches of any size, and again of a former one
            found_NK = spec.logits(engine, images_NCHW[rows])
            assert found_NK.dtype == torch.float32
            assert max(engines.distances(spec, found_NK, wanted_NK[rows])) <= 1e-5
    assert wanted_NK.std(0).min() > 0.01, "the pictures must be told apart"
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_the_chosen_engine_is_told_in_one_line(loaded: Any) -> None:
    pytest.importorskip("openvino")
    network, spec = loaded("cat_dog_conv_net")
    engine, told = choose_engine(network, spec, settings(), CPU, 1)
    assert engine is not network
    assert told.startswith("engine openvino fp32, 1 threads, within ")
    assert "\n" not in told
    assert choose_engine(network, spec, settings(engine="torch"), CPU, 1)[1].startswith("engine torch fp32")


def test_a_batch_takes_all_cores_while_nobody_else_needs_them(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network, spec = loaded("cat_dog_conv_net")
    ran: list[int] = []

    def build(network: Any, size_px: Any, precision: str, threads: int) -> engines.Engine:
        return lambda images_NCHW: (ran.append(threads), network(images_NCHW))[1]

    monkeypatch.setattr(engines, "_BUILDERS", {"openvino": build})
    engine, told = choose_engine(network, spec, settings(), CPU, 2, 12)
    assert told.endswith("of eager fp32, 8 while nobody else runs")
    assert ran == [2, 8]
    for elsewhere, wanted in ((0, 8), (4, 8), (5, 2), (None, 2)):
        monkeypatch.setattr(engines, "running_elsewhere", lambda elsewhere=elsewhere: elsewhere)
        engine(torch.zeros(1, 3, 224, 224))
        assert ran[-1] == wanted, elsewhere
    assert "nobody" not in choose_engine(network, spec, settings(), CPU, 2, 2)[1]
    assert "nobody" not in choose_engine(network, spec, settings(), CPU, 2)[1]

    def build_once(network: Any, size_px: Any, precision: str, threads: int) -> engines.Engine:
        if threads > 2:
            raise MemoryError("not twice")
        return build(network, size_px, precision, threads)

    monkeypatch.setattr(engines, "_BUILDERS", {"openvino": build_once})
    engine, told = choose_engine(network, spec, settings(), CPU, 2, 4)
    assert told.endswith("of eager fp32; 4 threads: MemoryError: not twice")
    engine(torch.zeros(1, 3, 224, 224))
    assert ran[-1] == 2


@pytest.mark.parametrize(
    ("text", "found"),
    [("0.1 0.2 0.3 3/456 789", 2), ("9 9 9 1/2 3", 0), ("0 0 0 0/0 0", None), ("", None), ("a", None)],
)
def test_who_else_runs_is_asked_of_the_kernel(text: str, found: int | None, tmp_path: Path) -> None:
    (tmp_path / "loadavg").write_text(text)
    assert engines.running_elsewhere(tmp_path / "loadavg") == found
    assert engines.running_elsewhere(tmp_path / "nowhere") is None


def test_without_openvino_torch_answers(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    network, spec = loaded("cat_dog_conv_net")
    _, told = choose_engine(network, spec, settings(engine="openvino"), CPU, 1)
    assert told.startswith("engine torch fp32")
    assert "openvino fp32: ModuleNotFoundError" in told
    assert "\n" not in told


@pytest.mark.parametrize("task", ["classification", "regression", "embedding"])
def test_an_engine_that_answers_otherwise_is_not_taken(loaded: Any, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    plain = task == "classification"
    network, spec = loaded("cat_dog_conv_net", **({} if plain else {"task": task, "labels": (), "outputs": 3}))

    def build_wrong(network: Any, size_px: Any, precision: str, threads: int) -> engines.Engine:
        return lambda images_NCHW: network(images_NCHW * 1.01)

    def build_broken(*_: Any) -> engines.Engine:
        raise RuntimeError("no such layer\nand a long tale")

    monkeypatch.setattr(engines, "_BUILDERS", {"openvino": build_wrong, "torch": build_broken})
    engine, told = choose_engine(network, spec, settings(), CPU, 1)
    assert engine is network
    assert told.startswith("engine eager fp32, 1 threads; openvino fp32: ")
    assert told.endswith("torch fp32: RuntimeError: no such layer")


def test_bf16_gives_way_to_fp32_where_it_answers_otherwise(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network, spec = loaded("cat_dog_conv_net")
    monkeypatch.setattr(engines, "cpu_has_bf16", lambda: True)
    monkeypatch.setitem(engines.TOLERANCE, "bf16", (0.05, 0.05))  # untrained networks differ by more than trained ones
    assert choose_engine(network, spec, settings("auto", "torch"), CPU, 1)[1].startswith("engine torch bf16, ")
    monkeypatch.setitem(engines.TOLERANCE, "bf16", (1e-7, 1e-7))
    _, told = choose_engine(network, spec, settings("auto", "torch"), CPU, 1)
    assert told.startswith("engine torch fp32, ")
    assert told.endswith("off eager fp32")


def test_a_sure_softmax_hides_no_wrong_engine(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network, spec = loaded("cat_dog_conv_net", temperature=1e-6)
    twice = {"torch": lambda network, *_: lambda images_NCHW: 2 * network(images_NCHW)}
    monkeypatch.setattr(engines, "_BUILDERS", twice)
    engine, told = choose_engine(network, spec, settings("fp32", "torch"), CPU, 1)
    assert engine is network
    assert "torch fp32: 0.0e+00 (" in told


def test_the_order_of_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "cpu_has_bf16", lambda: True)
    assert plans(settings("auto"), CPU) == [
        ("openvino", "bf16"),
        ("torch", "bf16"),
        ("openvino", "fp32"),
        ("torch", "fp32"),
    ]
    assert plans(settings("fp32"), CPU) == [("openvino", "fp32"), ("torch", "fp32")]
    monkeypatch.setattr(engines, "cpu_has_bf16", lambda: False)
    assert plans(settings("auto", "torch"), CPU) == [("torch", "fp32")]
    assert plans(settings("bf16", "torch"), CPU) == [("torch", "bf16"), ("torch", "fp32")]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert plans(settings("auto"), torch.device("cuda")) == [("torch", "fp16"), ("torch", "fp32")]


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("flags\t\t: fpu avx2\n", False),
        ("flags : fpu avx512_bf16\n", True),
        ("Features : fp bf16\n", True),
        ("", False),
    ],
)
def test_bf16_is_read_from_the_processor(tmp_path: Path, text: str, known: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_has_bf16(tmp_path / "cpuinfo") is known
    assert not cpu_has_bf16(tmp_path / "none")


def test_threads_are_set_told_or_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert fit_threads(3) == 3
    assert fit_threads() == cores
    monkeypatch.setattr(engines, "count_workers", lambda: cores * 4)
    assert fit_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert fit_threads() == 5


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core, which all share anyhow")
def test_no_engine_holds_on_to_a_core_that_another_worker_may_hold() -> None:
    pytest.importorskip("openvino")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 64, 3)).eval()
    run = engines.build_openvino(network, (96, 96), "fp32", 1)
    images_NCHW = torch.zeros(8, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    allowed, seen, ended = os.sched_getaffinity(0), [], threading.Event()
    here = threading.get_native_id()

    def watch() -> None:
        while not ended.is_set():
            seen.append(os.sched_getaffinity(here))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(20):
        run(images_NCHW)
    ended.set()
    watcher.join()
    assert len(seen) > 20
    assert all(cores == allowed for cores in seen)


def test_workers_count_those_of_their_own_server(tmp_path: Path) -> None:
    """As a worker does, each of three children of one parent counts the children that are workers."""
    (tmp_path / "model_service_worker.py").write_text(
        "import engines; print(engines.count_workers(), flush=True); input()"
    )
    parent = (
        "import subprocess as s, sys\n"
        "words = [sys.executable, 'model_service_worker.py']\n"
        "first = [s.Popen([*words], stdin=s.PIPE, stdout=s.DEVNULL) for _ in range(2)]\n"
        "last = s.Popen(words, stdin=s.PIPE, stdout=s.PIPE, text=True)\n"
        "print(last.stdout.readline())\n"
        "[p.communicate() for p in (*first, last)]\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", parent], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "3"
    assert count_workers() == 0
