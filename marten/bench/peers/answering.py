"""What a peer's process does with pictures, in either of two ways; the peers' own programs only carry bytes to it.

"quickstart" is what every tutorial shows: torchvision's transform, the network as it is in fp32, one picture at a
time, on the threads that torch takes by itself. "our engine" is what our handler does: decoding and network by the
card, bf16 where it is fast, batches where the peer makes them, one worker for each share of the cores.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torchvision.transforms import v2

from engines import choose_engine
from marten.architectures import build_network
from modelspec import ModelCard, ModelSpec, load_state_dict

QUICKSTART, OURS = "quickstart", "our engine"
BATCH = 8
WAIT_S = 0.001
"""How long a peer that makes batches waits for company, as our archives' maxBatchDelay says."""
_VARIABLE = "MARTEN_PEER"


@dataclass(frozen=True)
class Order:
    """What a peer's processes are told, by an environment variable: workers are started in every peer's own way.

    Attributes:
        weights: path, its card beside it.
        port: to answer on, at 127.0.0.1.
        way: QUICKSTART or OURS.
        workers: processes that compute.
        threads: of each; only OURS sets them.
        folder: for what the peer writes.
    """

    weights: str
    port: int
    way: str
    workers: int
    threads: int
    folder: str

    def variables(self) -> dict[str, str]:
        """The environment variable that carries this order."""
        return {_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def found(cls) -> Order:
        """The order that this process was started with."""
        return cls(**json.loads(os.environ[_VARIABLE]))


class Answerer(Protocol):
    """Turns encoded pictures into probabilities by label."""

    def answers(self, pictures: Sequence[bytes]) -> list[dict[str, float]]:
        """One dict for each picture, in their order."""


def build(order: Order) -> Answerer:
    """Load the network; takes seconds."""
    weights = Path(order.weights)
    spec = ModelCard.read(weights.with_suffix(".json")).spec
    network = build_network(spec.arch, spec.arch_args)
    network.load_state_dict(load_state_dict(weights))
    if order.way == QUICKSTART:
        return _Quickstart(network.eval(), spec)
    torch.set_num_threads(order.threads)
    return _WithEngine(network.eval(), spec, order.threads)


class _Quickstart:
    def __init__(self, network: torch.nn.Module, spec: ModelSpec) -> None:
        pre = spec.preprocess
        self._network, self._labels = network, spec.labels
        steps = [v2.Resize(256), v2.CenterCrop(pre.size_px), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        self._transform = v2.Compose([*steps, v2.Normalize(pre.mean, pre.std)])

    def answers(self, pictures: Sequence[bytes]) -> list[dict[str, float]]:
        images = [self._transform(Image.open(io.BytesIO(picture)).convert("RGB")) for picture in pictures]
        with torch.inference_mode():
            probabilities_NK = self._network(torch.stack(images)).softmax(1)
        return [dict(zip(self._labels, row, strict=True)) for row in probabilities_NK.tolist()]


class _WithEngine:
    def __init__(self, network: torch.nn.Module, spec: ModelSpec, threads: int) -> None:
        settings, cpu = {"precision": "auto", "engine": "auto"}, torch.device("cpu")
        self._engine, told = choose_engine(network, spec, settings, cpu, threads)
        self._spec = spec
        self._one_at_a_time = threading.Lock()  # an engine answers one batch after the other; peers may use threads
        print(told, flush=True)

    def answers(self, pictures: Sequence[bytes]) -> list[dict[str, float]]:
        pre = self._spec.preprocess
        pixels = [pre.pixels(pre.read(picture)) for picture in pictures]
        with self._one_at_a_time, torch.inference_mode():
            return self._spec.answers(self._spec.logits(self._engine, pre.normalize(torch.stack(pixels))))
