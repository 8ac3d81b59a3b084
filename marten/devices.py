"""Where a network runs and in which number format: chosen by what the machine really does well."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from marten.allocator import keep_freed_memory
from marten.distributed import ALONE, World
from marten.errors import UsageError
from marten.settings import DEVICES, PRECISIONS


@dataclass(frozen=True)
class Runtime:
    """A device and the number format of its matrix products.

    Attributes:
        device: chosen.
        precision: "fp32", "bf16" or "fp16".
    """

    device: torch.device
    precision: str

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context in which a forward pass runs."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{name} in {self.precision}"


def choose_runtime(device: str = "auto", precision: str = "auto", world: World = ALONE) -> Runtime:
    """Take what is asked for, or the best there is: cuda, then mps, then cpu.

    "auto" precision is bf16 where the processor computes in it (cuda from capability 8.0, CPUs with avx512_bf16 or
    amx), fp16 on older GPUs, else fp32. Of several processes each takes its own GPU.
    On the CPU, memory that is freed stays with the process from then on, which is up to 1.6 x as fast.

    Raises:
        UsageError: an unknown word, or a device or format that this machine lacks.
    """
    if device not in DEVICES:
        raise UsageError(f"--device must be one of {', '.join(DEVICES)}, found {device!r}")
    if precision not in PRECISIONS:
        raise UsageError(f"--precision must be one of {', '.join(PRECISIONS)}, found {precision!r}")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in present.items() if there)
    if not present[device]:
        raise UsageError(f"--device {device}: this machine has none that torch {torch.__version__} can use")
    if precision == "fp16" and device == "cpu":
        raise UsageError("--precision fp16 needs a GPU: use bf16 or fp32 on the CPU")
    if precision == "auto":
        precision = _best_precision(device)
    if device == "cpu":
        keep_freed_memory()
    if device == "cuda" and world.size > 1:
        index = world.local_rank % torch.cuda.device_count()  # one that sees a single GPU was given its own
        torch.cuda.set_device(index)
        return Runtime(torch.device(device, index), precision)
    if device == "mps" and world.size > 1:
        raise UsageError("several processes cannot share this machine's GPU: use --device cpu, or one process")
    return Runtime(torch.device(device), precision)


def _best_precision(device: str) -> str:
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    if device == "cpu":
        # the processor's own instructions, without which bf16 is slower than fp32
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if fast else "fp32"
    return "fp32"
