"""Profiling's network in bf16 on a processor: run by OpenVINO, where that is installed and agrees with the network.

Torch computes convolutions in bf16 twice as fast, but activations, gates and pooling between them fetch every value
from memory as before, so that all in all a quarter is gained. OpenVINO joins these steps to the convolutions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from engines import convert, import_openvino
from marten.cells.networks import Profiler, layer_output

Features = Callable[[torch.Tensor], torch.Tensor]
"""From float32 crops of shape (cells, channels, height, width) to float32 features of shape (cells, features)."""

COSINE = 0.999
"""Least cosine between features in bf16 and in fp32, of each of the drawn crops."""
_DRAWN = 4


def openvino_features(profiler: Profiler, channels: int, size_px: int, threads: int) -> tuple[Features | None, str]:
    """Convert the network up to its layer, and compare it with itself in fp32 on drawn crops.

    Args:
        profiler: its network on the CPU, in fp32.
        channels: of a crop as the network sees it.
        size_px: side of that crop.
        threads: that will each ask for batches of their own, at the same time.

    Returns:
        What gives features in bf16, for any number of threads; None where OpenVINO is missing, cannot convert the
        network, or does not agree. And a line that tells which.
    """
    crops_NCHW = drawn_crops(channels, size_px)
    try:
        features = _convert(profiler, channels, size_px, threads)
        with torch.inference_mode():
            found_NK, wanted_NK = features(crops_NCHW), layer_output(profiler.network, crops_NCHW, profiler.layer)
    except Exception as error:  # not installed, an operation that it does not know, no memory: whatever it is
        first_line = (str(error).splitlines() or [""])[0][:160]
        return None, f"torch, for OpenVINO cannot ({type(error).__name__}: {first_line})"
    cosine = float(functional.cosine_similarity(found_NK, wanted_NK, dim=1).min())
    if not cosine >= COSINE:  # also where it is no number
        return None, f"torch, for OpenVINO in bf16 has a cosine of {cosine:.5f} with fp32"
    return features, "OpenVINO"


def drawn_crops(channels: int, size_px: int) -> torch.Tensor:
    """Smooth spots in each channel, stretched to 0..1 as crops of cells are; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    coarse_NCHW = torch.rand((_DRAWN, channels, 8, 8), generator=generator)
    crops_NCHW = functional.interpolate(coarse_NCHW, (size_px, size_px), mode="bicubic", align_corners=False)
    low, high = crops_NCHW.amin((2, 3), keepdim=True), crops_NCHW.amax((2, 3), keepdim=True)
    return (crops_NCHW - low) / (high - low + 1e-7)


def _convert(profiler: Profiler, channels: int, size_px: int, threads: int) -> Features:
    model = convert(_Layer(profiler), torch.zeros(1, size_px, size_px, channels))
    options = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads}
    options |= {"ENABLE_CPU_PINNING": False}  # parts of one profile run side by side, each pinned to the first cores
    compiled = import_openvino().Core().compile_model(model, "CPU", options)
    mine = threading.local()

    def features(crops_NCHW: torch.Tensor) -> torch.Tensor:
        if not hasattr(mine, "request"):
            mine.request = compiled.create_infer_request()
        crops_NHWC = crops_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
        found = mine.request.infer([crops_NHWC], share_inputs=True)[0]
        return torch.from_numpy(found.copy())  # the request writes the next batch to the same place

    return features


class _Layer(torch.nn.Module):
    """A network up to one layer, which takes its crops as they lie in memory."""

    def __init__(self, profiler: Profiler) -> None:
        super().__init__()
        self.network = profiler.network
        self._layer = profiler.layer

    def forward(self, crops_NHWC: torch.Tensor) -> Any:
        return layer_output(self.network, crops_NHWC.permute(0, 3, 1, 2), self._layer)
