"""What is compared: archives of one network for our handler and for TorchServe's own, each behind a server."""

from __future__ import annotations

import dataclasses
import json
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from marten import server
from marten.architectures import build_network, find_architecture
from marten.archive import HANDLER, MODEL_CONFIG, plan_archive
from marten.fitting import available_cores
from marten.readiness import Address, free_ports
from marten.runtime import Running
from marten.serverconfig import read_settings
from modelspec import ModelCard, ModelSpec, sha256_file

FAST_CONFIG = MODEL_CONFIG.with_name("model-config-fast.yaml")
STOCK, FITTED, EXACT, FAST = "stock", "stock fitted", "ours fp32", "ours fast"
"""TorchServe with its ImageClassifier, one worker on all cores; the same with as many workers and threads as we have;
our handler as archives have it; our handler with `precision: auto`."""

_LABELS = ("ant", "bee", "cat", "dog", "eel")  # TorchServe's ImageClassifier fails with fewer than five


@dataclass
class Contestant:
    """A server of one or more copies of one network."""

    name: str
    names: list[str]
    running: Running
    start_s: float
    threads: int

    @property
    def address(self) -> Address:
        """Where it answers."""
        return self.running.addresses["inference"]

    def memory_mb(self) -> float:
        """Memory of all its workers, shared pages counted by share (PSS)."""
        import psutil

        workers = [p for p in psutil.Process(self.running.pid).children() if "service_worker" in " ".join(p.cmdline())]
        return float(sum(p.memory_full_info().pss for p in workers)) / 1e6

    def stop(self) -> None:
        """End it, without waiting for requests."""
        server.stop(self.running, 0)


def make_weights(conv_net: str, folder: Path) -> Path:
    """Untrained weights with their card: as fast as trained ones. Small outputs, so that rounding moves no answer."""
    architecture = find_architecture(conv_net)
    arch_args = {**architecture.arch_args, "num_classes": len(_LABELS)}
    spec = ModelSpec(conv_net, architecture.arch, _LABELS, arch_args, topk=5, preprocess=architecture.preprocess)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(spec.arch, spec.arch_args)
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(0.05)
    weights = folder / f"model_{conv_net}.pth"
    torch.save(network.state_dict(), weights)
    weights.with_suffix(".json").write_text(ModelCard(spec, sha256_file(weights)).to_json(), encoding="utf-8")
    return weights


def pack(kind: str, weights: Path, folder: Path) -> Path:
    """Write the archive of one contestant into a store of its own; returns the store."""
    store = folder / kind.replace(" ", "_")
    store.mkdir()
    plan = plan_archive(
        weights, export_path=store, parts=folder / "parts", config=FAST_CONFIG if kind == FAST else MODEL_CONFIG
    )
    model = {"modelName": plan.name, "modelVersion": "1.0", "modelFile": plan.network.name}
    model |= {"serializedFile": weights.name, "handler": HANDLER.name, "configFile": plan.config.name}
    network = plan.network.read_text(encoding="utf-8")
    files = [HANDLER, *plan.extra_files, plan.config]
    if kind in (STOCK, FITTED):
        files = [plan.labels]
        model = {**model, "handler": "image_classifier"}
        del model["configFile"]
        network += _without_arguments(plan.card.spec)
    with zipfile.ZipFile(plan.mar, "w") as archive:
        manifest = {"createdOn": "", "runtime": "python", "model": model, "archiverVersion": "0.12.0"}
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr(plan.network.name, network)
        for file in [weights, *files]:
            archive.write(file, file.name)
    return store


def _without_arguments(spec: ModelSpec) -> str:
    """Lines that let TorchServe's own handlers, which pass no arguments, build this network."""
    name = type(build_network(spec.arch, spec.arch_args)).__name__
    return f"\n\n_init = {name}.__init__\n{name}.__init__ = lambda self: _init(self, **{dict(spec.arch_args)!r})\n"


def launch(kind: str, store: Path, copies: int = 1) -> Contestant:
    """Serve the one archive of a store, under several names where asked.

    Raises:
        ServerError: it does not start.
    """
    (mar,) = store.glob("*.mar")
    names = [f"{mar.stem}_{i}" for i in range(copies)]
    ports = dict(zip(("inference", "management", "metrics"), free_ports(3), strict=True))
    workers = 1 if kind == STOCK else None
    settings = read_settings([f"{name}={mar.name}" for name in names], store, ports=ports, workers=workers)
    if kind == STOCK:  # as TorchServe itself has it, however many models there are
        settings = dataclasses.replace(settings, threads=available_cores())
    begun = time.monotonic()
    running, _, _ = server.start(settings)
    return Contestant(kind, names, running, time.monotonic() - begun, settings.threads)
