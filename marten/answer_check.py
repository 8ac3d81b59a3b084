"""Whether an archive answers as its model does: golden pictures, asked of both, compared."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from marten.architectures import build_network
from marten.archive_check import read_config
from marten.errors import ArchiveError
from modelspec import ModelSpec, load_state_dict

TOLERANCE = {"fp32": 3e-5, "bf16": 0.01, "auto": 0.01}
"""How far an answer may lie from the state dict's in fp32, by the precision that model-config.yaml asks for.

For fp32 it is the rounding of fp32 itself: a deep network with drawn weights (vgg) lies 3e-5 from its own outputs in
fp64, so two orders of summation may differ by as much. Trained networks stay far below.
"""

OUTPUT_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "auto": 0.1}
"""The same for the network's outputs, relative to the largest of them where that exceeds 1."""

_PROBE = Path(__file__).with_name("archive_probe.py")
_LOAD_TIMEOUT_S = 300


def check_answers(folder: Path, spec: ModelSpec, weights: Path, python: str = sys.executable) -> float:
    """Load an unpacked archive in a process that sees nothing else, and compare its answers with the state dict's.

    Args:
        folder: the unpacked archive.
        spec: the model's, from the card beside `weights`.
        weights: the state dict.
        python: the interpreter that loads the archive.

    Returns:
        The largest difference found between two answers, relative where they exceed 1.

    Raises:
        ArchiveError: it does not load, fails a good picture, answers a broken one, or answers otherwise.
    """
    pictures, broken = golden_pictures()
    wanted_NK = expected_outputs(spec, weights, list(pictures.values()))
    wanted = spec.answers(wanted_NK, topk=max(1, len(spec.labels)))
    report = ask_archive(folder, [*pictures.values(), broken], python)
    *replies, refusal = report["replies"]
    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text(encoding="utf-8"))
    settings = read_config(folder / manifest["model"]["configFile"]).get("handler", {})
    precision = settings.get("precision", "fp32")
    largest = 0.0
    for i, (name, reply) in enumerate(zip(pictures, replies, strict=True)):
        if reply["code"] != 200:
            raise ArchiveError(f"the archive refuses the golden picture {name}: {reply['body']}")
        differs_by = answer_distance(reply["body"], wanted[i], spec)
        outputs_differ_by = _gap(report["outputs"][i], wanted_NK[i].tolist())
        if not (differs_by <= TOLERANCE[precision] and outputs_differ_by <= OUTPUT_TOLERANCE[precision]):
            raise ArchiveError(
                f"the archive answers {reply['body']} from the outputs {report['outputs'][i]} to the golden picture "
                f"{name}, but its state dict {wanted[i]} from {wanted_NK[i].tolist()}: it must not be served"
            )
        largest = max(largest, differs_by)
    if not 400 <= refusal["code"] < 500:
        raise ArchiveError(f"the archive does not refuse a broken picture: {refusal}")
    return largest


def golden_pictures(seed: int = 0) -> tuple[dict[str, bytes], bytes]:
    """Nine pictures of as many kinds by name, and one that is cut off; drawn by program, the same at every call."""
    rng = random.Random(seed)

    def blot(width: int, height: int, mode: str = "RGB") -> Image.Image:
        patch = Image.frombytes("RGB", (8, 6), rng.randbytes(3 * 8 * 6))
        return patch.resize((width, height), Image.Resampling.BICUBIC).convert(mode)

    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = blot(300, 200, "RGBA")
    alpha.putalpha(blot(300, 200, "L"))
    deep = blot(256, 256, "L").convert("I").point(lambda v: v * 257).convert("I;16")
    drawn: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (blot(400, 300), "JPEG", {}),
        "jpeg_large": (blot(1600, 1200), "JPEG", {"quality": 90}),
        "jpeg_grey": (blot(320, 240, "L"), "JPEG", {}),
        "jpeg_cmyk": (blot(320, 240, "CMYK"), "JPEG", {}),
        "jpeg_turned": (blot(240, 320), "JPEG", {"exif": turned}),
        "png_alpha": (alpha, "PNG", {}),
        "png_16bit": (deep, "PNG", {}),
        "gif_palette": (blot(200, 150, "P"), "GIF", {}),
        "bmp_wide": (blot(640, 40), "BMP", {}),
    }
    encoded = {}
    for name, (picture, kind, options) in drawn.items():
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        encoded[name] = buffer.getvalue()
    return encoded, encoded["jpeg"][: len(encoded["jpeg"]) // 2]


def ask_archive(folder: Path, bodies: Sequence[bytes], python: str = sys.executable) -> dict[str, list[Any]]:
    """Send one batch to an unpacked archive through ts's own loader, in a process of its own.

    Returns:
        {"replies": what `archive_probe.read_replies` gives, one for each body; "outputs": the network's, one row for
        each picture that reached it}.

    Raises:
        ArchiveError: the archive does not load; ends with the worker's own words.
    """
    with tempfile.TemporaryDirectory(prefix="marten-probe-") as private:
        requests, report = Path(private) / "requests", Path(private) / "report.json"
        requests.mkdir()
        for i, body in enumerate(bodies):
            (requests / f"{i:06d}").write_bytes(body)
        try:
            done = subprocess.run(
                [python, str(_PROBE), str(folder), str(requests), str(report)],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_LOAD_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ArchiveError(f"the archive did not load and answer within {_LOAD_TIMEOUT_S} s") from error
        if done.returncode != 0 or not report.is_file():
            raise ArchiveError(f"the archive does not load: {_worker_error(done.stderr) or f'exit {done.returncode}'}")
        return dict(json.loads(report.read_text(encoding="utf-8")))


def _worker_error(stderr: str) -> str:
    """The exception that ended a worker, in one line."""
    errors = [line for line in stderr.splitlines() if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return errors[-1] if errors else stderr.strip()[-300:]


def expected_outputs(spec: ModelSpec, weights: Path, pictures: Sequence[bytes]) -> Any:
    """What the network itself gives for some pictures as one batch, in fp32 on the CPU.

    Returns:
        float32 tensor of shape (pictures, outputs).

    Raises:
        MartenError: the weights cannot be read or do not fit the network.
    """
    import torch

    model = build_network(spec.arch, spec.arch_args)
    try:
        model.load_state_dict(load_state_dict(weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ArchiveError(f"{weights} does not fit {spec.arch} with {dict(spec.arch_args)}: {reason}") from error
    model.eval()
    pixels_NHWC = torch.stack([spec.preprocess.pixels(spec.preprocess.read(data)) for data in pictures])
    with torch.inference_mode():
        return spec.logits(model, spec.preprocess.normalize(pixels_NHWC))


def answer_distance(answer: Mapping[str, Any], expected: Mapping[str, Any], spec: ModelSpec) -> float:
    """How far an answer lies from the expected one, which holds all labels; infinite when its labels are wrong.

    Labels whose probabilities are equal may change places.
    """
    wanted = min(spec.topk, len(spec.labels)) if spec.labels else len(expected)
    if len(answer) != wanted or not set(answer) <= set(expected):
        return math.inf
    gaps = [_gap(value, expected[key]) for key, value in answer.items()]
    if spec.labels:
        lowest = min(answer.values())
        gaps += [value - lowest for key, value in expected.items() if key not in answer]
    return max(gaps)


def _gap(found: Any, wanted: Any) -> float:
    """Largest difference of two numbers or rows of numbers, relative to the largest wanted one where that exceeds 1."""
    a, b = (value if isinstance(value, list) else [value] for value in (found, wanted))
    if len(a) != len(b) or not all(map(math.isfinite, [*a, *b])):
        return math.inf
    return float(max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(1.0, *map(abs, b)))
