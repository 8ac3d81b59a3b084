"""The most a machine can give for one network: pictures decoded and answered in one process, with no server between.

A process of its own, because threads are set once: `Limit` starts it and asks it for rounds.

    python -m marten.bench.limit WEIGHTS PICTURES THREADS
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from marten.bench.load import Load, median, percentile
from marten.files import ROOT
from marten.fitting import available_cores

BATCH = 8


class Limit:
    """That process, kept waiting between rounds."""

    def __init__(self, weights: Path, pictures: Path, threads: int) -> None:
        words = [sys.executable, "-m", "marten.bench.limit", str(weights), str(pictures), str(threads)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        self.engine = self._read()

    def round(self, clients: int, seconds: float) -> Load:
        """For one client: one picture after the other, on a worker's threads. For more: batches, on every core."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{clients} {seconds}\n")
        self._process.stdin.flush()
        return Load(**json.loads(self._read()))

    def stop(self) -> None:
        """End it."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _main(weights: Path, folder: Path, threads: int) -> None:
    import torch

    from engines import choose_engine
    from marten.architectures import build_network
    from modelspec import ModelCard, load_state_dict

    spec = ModelCard.read(weights.with_suffix(".json")).spec
    network = build_network(spec.arch, spec.arch_args)
    network.load_state_dict(load_state_dict(weights))
    torch.set_num_threads(threads)
    lanes = max(1, available_cores() // threads)
    settings, cpu = {"precision": "auto", "engine": "auto"}, torch.device("cpu")
    built = [choose_engine(network.eval(), spec, settings, cpu, threads) for _ in range(lanes)]
    print(built[0][1], flush=True)
    bodies = [path.read_bytes() for path in sorted(folder.iterdir())]

    def answer(lane: int, first: int, count: int) -> None:
        """Decode some pictures and answer them, as one batch, on one lane's engine."""
        encoded = [bodies[i % len(bodies)] for i in range(first, first + count)]
        pixels = [spec.preprocess.pixels(spec.preprocess.read(data)) for data in encoded]
        with torch.inference_mode():
            spec.answers(spec.logits(built[lane][0], spec.preprocess.normalize(torch.stack(pixels))))

    with ThreadPoolExecutor(lanes) as pool:

        def batches(turn: int) -> int:
            firsts = [BATCH * (lanes * turn + lane) for lane in range(lanes)]
            list(pool.map(answer, range(lanes), firsts, [BATCH] * lanes))
            return BATCH * lanes

        def single(turn: int) -> int:
            answer(0, turn, 1)
            return 1

        for line in sys.stdin:
            clients, seconds = line.split()
            print(json.dumps(_time(single if clients == "1" else batches, float(seconds))), flush=True)


def _time(work: Callable[[int], int], seconds: float) -> dict[str, float]:
    work(0)
    begun, cpu_begun, done, times, turn = time.perf_counter(), time.process_time(), 0, [], 0
    while time.perf_counter() < begun + seconds:
        asked = time.perf_counter()
        done += work(turn)
        times.append(1000 * (time.perf_counter() - asked))
        turn += 1
    rate = done / (time.perf_counter() - begun)
    cpu_ms = 1000 * (time.process_time() - cpu_begun) / done
    return {"requests_s": rate, "p50_ms": median(times), "p99_ms": percentile(times, 99), "failed": 0, "cpu_ms": cpu_ms}


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
