"""Engines: one network, run as fast as the server's machine can, and never otherwise than its weights say.

An engine is a function from images to outputs, as the network itself is, and takes its place in `ModelSpec.logits`:

    openvino   OpenVINO on the CPU, converted from the loaded network; needs the package `openvino` in the server
    torch      batch normalisation folded into convolutions, channels_last; on the CPU and on a GPU
    eager      the network as it was loaded: the yardstick, and what is left when all else fails

Each is built where the model is loaded, so that an archive never depends on the machine that made it, and must give
the answers of the eager network in fp32 to two drawn pictures before it may give any other.

It travels in every .mar beside modelspec.py, and runs on Python 3.9 with torch 2.4 as well.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple
from unittest.mock import MagicMock

import torch

from modelspec import ModelSpec

Engine = Callable[[torch.Tensor], torch.Tensor]
"""From float32 images of shape (batch, 3, height, width), on its device, to outputs of shape (batch, outputs)."""

CHOICES = {"precision": ("auto", "fp32", "bf16"), "engine": ("auto", "openvino", "torch")}
TOLERANCE = {"fp32": (2e-6, 2e-5), "bf16": (2e-3, 0.05), "fp16": (2e-3, 0.05)}
"""How far an engine may lie from the eager network: in probability, and in its outputs relative to the largest of them.

The outputs count too, because a softmax that is sure of the drawn pictures would hide what its inputs show.
"""

MOST_THREADS = 8
"""For one batch: beyond, threads wait for each other more than they help."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OPENVINO_TYPES = {"fp32": "f32", "bf16": "bf16"}


def choose_engine(
    network: torch.nn.Module,
    spec: ModelSpec,
    settings: Mapping[str, Any],
    device: torch.device,
    threads: int,
    cores: int = 0,
) -> Tuple[Engine, str]:
    """Build the fastest engine that the settings allow, that this machine has, and that answers as the network does.

    Args:
        network: in eval mode, on `device`.
        spec: of the network.
        settings: "precision" and "engine", as CHOICES lists them; neither is a promise, both fall back.
        device: where it runs.
        threads: for one batch on the CPU.
        cores: of all workers together, of which a batch may have up to MOST_THREADS while nobody else needs them.

    Returns:
        The engine, and one line that tells what it is and why it is no faster one.
    """
    if settings["precision"] == "fp32":  # and no GPU's shorter format in its place
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    images_NCHW = spec.preprocess.normalize(drawn_pixels(spec.preprocess.size_px).to(device))
    reasons = []
    with torch.inference_mode():
        wanted_NK = spec.logits(network, images_NCHW)

        def checked(name: str, precision: str, threads: int) -> Tuple[Engine, float]:
            engine = _BUILDERS[name](network, spec.preprocess.size_px, precision, threads)
            gap, outputs_gap = distances(spec, spec.logits(engine, images_NCHW), wanted_NK)
            if gap > TOLERANCE[precision][0] or outputs_gap > TOLERANCE[precision][1]:
                raise _OffError("{:.1e} ({:.1e}) off eager fp32".format(gap, outputs_gap))
            return engine, gap

        for name, precision in plans(settings, device):
            try:
                engine, gap = checked(name, precision, threads)
            except Exception as error:  # a missing package, a layer that it does not know, no memory: whatever it is
                reasons.append("{} {}: {}".format(name, precision, _first_line(error)))
                continue
            told = "engine {} {}, {} threads, within {:.0e} of eager fp32".format(name, precision, threads, gap)
            wide = min(cores, MOST_THREADS)
            if name == "openvino" and wide > threads:
                try:
                    engine = _in_turns(engine, checked(name, precision, wide)[0], cores - wide)
                    told += ", {} while nobody else runs".format(wide)
                except Exception as error:  # no memory for it twice
                    reasons.append("{} threads: {}".format(wide, _first_line(error)))
            return engine, "; ".join([told, *reasons])
    return network, "; ".join(["engine eager fp32, {} threads".format(threads), *reasons])


def plans(settings: Mapping[str, Any], device: torch.device) -> List[Tuple[str, str]]:
    """Engines with their precision in the order in which they are tried; the fastest first."""
    asked = settings["precision"]
    fast = short_format(device) if asked == "auto" else asked
    precisions = list(dict.fromkeys([fast, "fp32"]))
    names = ["torch"] if settings["engine"] == "torch" or device.type != "cpu" else ["openvino", "torch"]
    return [(name, precision) for precision in precisions for name in names]


def short_format(device: torch.device) -> str:
    """The shortest number format in which a device computes at full speed: "bf16", "fp16" or "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bf16 itself; without that, bf16 is slower than fp32, not faster."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    known = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return bool(known & {"avx512_bf16", "amx_bf16", "bf16"})


def drawn_pixels(size_px: Tuple[int, int]) -> torch.Tensor:
    """Two drawn pictures, the same at every call: uint8 of shape (2, height, width, 3), smooth as photographs are."""
    generator = torch.Generator().manual_seed(0)
    coarse_NCHW = torch.rand((2, 3, 6, 8), generator=generator)
    smooth_NCHW = torch.nn.functional.interpolate(coarse_NCHW, size_px, mode="bicubic", align_corners=False)
    return smooth_NCHW.mul(255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def distances(spec: ModelSpec, found_NK: torch.Tensor, wanted_NK: torch.Tensor) -> Tuple[float, float]:
    """Largest difference of two batches in probability (0 where there is none), and in outputs, relative."""
    outputs_gap = float((found_NK - wanted_NK).abs().max() / wanted_NK.abs().max().clamp(min=1))
    if spec.task != "classification":
        return 0.0, outputs_gap
    return float((spec.probabilities(found_NK) - spec.probabilities(wanted_NK)).abs().max()), outputs_gap


# ----------------------------------------------------------------------------------------------------- the engines


def build_torch(network: torch.nn.Module, size_px: Tuple[int, int], precision: str, threads: int) -> Engine:
    """Fold batch normalisation into convolutions where the network can be traced, and lay it out channels last."""
    dtype = _DTYPES[precision]
    fast = _folded(network).to(dtype=dtype).to(memory_format=torch.channels_last)

    def run(images_NCHW: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = fast(images_NCHW.to(dtype=dtype, memory_format=torch.channels_last))
        return outputs

    return run


def _folded(network: torch.nn.Module) -> torch.nn.Module:
    try:
        from torch.fx.experimental.optimization import fuse

        folded: torch.nn.Module = fuse(network)
        return folded
    except Exception:  # its forward decides by values, which a trace cannot follow
        return copy.deepcopy(network)


def build_openvino(network: torch.nn.Module, size_px: Tuple[int, int], precision: str, threads: int) -> Engine:
    """Convert the network for OpenVINO's CPU plugin, for batches of any size."""
    model = convert(_FromNHWC(network), torch.zeros(1, *size_px, 3))
    options = {
        "INFERENCE_PRECISION_HINT": _OPENVINO_TYPES[precision],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # each process would pin itself to the first cores: two workers to the same one
    }
    request = import_openvino().Core().compile_model(model, "CPU", options).create_infer_request()

    def run(images_NCHW: torch.Tensor) -> torch.Tensor:
        images_NHWC = images_NCHW.permute(0, 2, 3, 1).contiguous().numpy()  # no copy: they are channels_last
        outputs: torch.Tensor = torch.from_numpy(request.infer([images_NHWC], share_inputs=True)[0])
        return outputs

    return run


def convert(network: torch.nn.Module, black_NHWC: torch.Tensor) -> Any:
    """OpenVINO's model, for batches of any size, of a network that takes its images as they lie in memory.

    Args:
        network: in eval mode; who converts it checks its answers.
        black_NHWC: one image.
    """
    openvino = import_openvino()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing is deprecated in favour of torch.export, which takes twice as long
        # the trace's own check would import 500 modules, 1 s and 60 MB
        trace: Callable[..., Any] = torch.jit.trace
        traced = trace(network, black_NHWC, check_trace=False)
        shape = openvino.PartialShape([-1, *black_NHWC.shape[1:]])
        return openvino.convert_model(traced, example_input=black_NHWC, input=[shape])


def _in_turns(narrow: Engine, wide: Engine, most_elsewhere: int) -> Engine:
    """One engine of two: the wide one while no more than so many threads run elsewhere on this machine."""

    def run(images_NCHW: torch.Tensor) -> torch.Tensor:
        elsewhere = running_elsewhere()
        return (narrow if elsewhere is None or elsewhere > most_elsewhere else wide)(images_NCHW)

    return run


class _FromNHWC(torch.nn.Module):
    """A network that takes its images as they lie in memory."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_NHWC: torch.Tensor) -> Any:
        return self.network(images_NHWC.permute(0, 3, 1, 2))


_BUILDERS: Dict[str, Callable[[torch.nn.Module, Tuple[int, int], str, int], Engine]] = {
    "openvino": build_openvino,
    "torch": build_torch,
}


# ------------------------------------------------------------------------------------------------------- threads


def fit_threads(setting: Any = "auto") -> int:
    """Threads for this worker: as set, else as OMP_NUM_THREADS says, else its share of the cores.

    scripts/serve sets OMP_NUM_THREADS, knowing how many workers there will be. Under a `torchserve` started by hand the
    workers that are there count themselves.
    """
    if setting != "auto":
        return int(setting)
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdigit() and int(told) > 0:
        return int(told)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, count_workers()))


def cores_told() -> int:
    """Cores that all workers share, as scripts/serve, who knows a container's, tells them; 0 where nobody does."""
    told = os.environ.get("MARTEN_CORES", "")
    return int(told) if told.isdigit() else 0


def running_elsewhere(loadavg: Path = Path("/proc/loadavg")) -> Optional[int]:
    """Threads of this machine that run or could run just now, besides the one that asks; None where none are told."""
    try:
        running = int(loadavg.read_text(encoding="ascii").split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return None
    return running - 1 if running > 0 else None  # some containers tell of none


def count_workers() -> int:
    """Workers of the TorchServe that started this process, this one among them; 0 when none did."""
    try:
        import psutil

        family = psutil.Process(os.getppid()).children()
        return sum("model_service_worker" in " ".join(child.cmdline()) for child in family)
    except Exception:  # no psutil, or a process that ended while it was looked at
        return 0


class _OffError(Exception):
    """An engine does not answer as the network does."""


def _first_line(error: Exception) -> str:
    if isinstance(error, _OffError):
        return str(error)
    return "{}: {}".format(type(error).__name__, (str(error).strip().splitlines() or [""])[0][:200])


# ------------------------------------------------------------------------------------------------------- imports


@contextlib.contextmanager
def unloaded(*names: str) -> Iterator[None]:
    """Import something without the modules that it names and that nobody calls: seconds, and memory of each worker.

    Until the end, something that takes every call stands in the place of each that is not loaded yet; after it, whoever
    imports one finds the real one.
    """
    absent = {name: MagicMock() for name in names if name not in sys.modules}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def import_torchvision() -> None:
    """torchvision, without the compiler that it imports for an operation of detectors: 1 s and 100 MB."""
    with unloaded("torch._dynamo", "torch._dynamo.utils"):
        import torchvision  # noqa: F401


def import_openvino() -> Any:
    """OpenVINO without its reports of every conversion to Google Analytics.

    Each is sent by a process that a thread forks, and which may wait for a lock for ever, as then does who forked it.
    """
    # None, which no type foresees there, is how Python is told that a module cannot be imported
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino  # type: ignore[import-not-found, unused-ignore]

    return openvino
