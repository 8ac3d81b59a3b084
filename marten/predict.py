"""Answers for pictures on disk, by the very functions that the server runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageShow

from marten.errors import MartenError, PictureError
from marten.files import available_cpus, replacing
from modelspec import ModelSpec, read_picture


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture, or why there is none.

    Attributes:
        path: the picture's file.
        answer: as the server gives it, for instance {"dog": 0.98}; None for a bad picture.
        reason: why a bad picture has no answer, else empty.
    """

    path: Path
    answer: dict[str, Any] | None
    reason: str = ""


def predict(
    network: torch.nn.Module,
    spec: ModelSpec,
    paths: Sequence[Path],
    device: torch.device | str = "cpu",
    topk: int | None = None,
    batch_size: int = 16,
) -> Iterator[Prediction]:
    """Answer pictures in order, a bad one with its reason instead of an end to all.

    Args:
        network: in eval mode, on `device`.
        spec: of the network.
        paths: any number; memory holds two batches of decoded pictures at most.
        device: where the network is.
        topk: how many labels per answer; the card's own when None.
        batch_size: pictures per forward pass.
    """

    def look(path: Path) -> torch.Tensor | str:
        try:
            return spec.preprocess.pixels(spec.preprocess.read(path))
        except OSError as error:
            return error.strerror or str(error)
        except PictureError as error:
            return str(error)

    groups = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    with ThreadPoolExecutor(available_cpus()) as pool:
        ahead = [pool.submit(look, path) for path in groups[0]] if groups else []
        for number, group in enumerate(groups):
            waiting = ahead
            following = groups[number + 1] if number + 1 < len(groups) else []
            ahead = [pool.submit(look, path) for path in following]
            seen = [future.result() for future in waiting]
            good = [pixels for pixels in seen if isinstance(pixels, torch.Tensor)]
            answers = iter(_answer(network, spec, good, device, topk))
            for path, pixels in zip(group, seen, strict=True):
                yield Prediction(path, None, pixels) if isinstance(pixels, str) else Prediction(path, next(answers))


@torch.inference_mode()
def _answer(
    network: torch.nn.Module, spec: ModelSpec, pixels: list[torch.Tensor], device: torch.device | str, topk: int | None
) -> list[dict[str, Any]]:
    if not pixels:
        return []
    images_NCHW = spec.preprocess.normalize(torch.stack(pixels).to(device))
    return spec.answers(spec.logits(network, images_NCHW), topk)


def captioned(path: Path, text: str, longest_px: int = 800) -> Image.Image:
    """The picture as the network was shown it, upright, no larger than `longest_px`, its answer in a band below it.

    The sheet is as wide as the picture or as the words, whichever is wider.
    """
    picture = read_picture(path, longest_px)
    picture.thumbnail((longest_px, longest_px))
    size_px = max(16, picture.width // 24)
    font = ImageFont.load_default(size_px)
    band = int(size_px * 1.8)
    width = max(picture.width, math.ceil(font.getlength(text)) + size_px)
    sheet = Image.new("RGB", (width, picture.height + band), "white")
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    ImageDraw.Draw(sheet).text((width / 2, picture.height + band / 2), text, "black", font, anchor="mm")
    return sheet


def caption_files(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Where the captioned pictures go: <stem>.png in `folder`, numbered where several would be called the same."""
    used: set[str] = set()
    targets = []
    for path in paths:
        name, number = path.stem, 1
        while name in used:
            number += 1
            name = f"{path.stem}-{number}"
        used.add(name)
        targets.append(folder / f"{name}.png")
    return targets


def save_captioned(prediction: Prediction, text: str, target: Path) -> None:
    """Write the captioned picture to `target`, a .png.

    Raises:
        MartenError: the folder cannot be written.
    """
    with replacing(target) as neighbour:
        captioned(prediction.path, text).save(neighbour, format="PNG")


def show_captioned(prediction: Prediction, text: str) -> None:
    """Open the captioned picture on this machine's screen.

    Raises:
        MartenError: no program here shows pictures.
    """
    if not ImageShow.show(captioned(prediction.path, text), prediction.path.name):
        raise MartenError("no program here shows pictures: write them with --save DIR instead of --show")
