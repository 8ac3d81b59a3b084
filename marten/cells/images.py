"""Images of a microscope: read in any depth and format they come in, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from marten.cells.errors import CellsError

Plane = NDArray[Any]
"""One channel of one site, of shape (height, width)."""


def read_plane(path: Path) -> Plane:
    """Read one channel of one site, whatever its depth.

    Returns:
        Array of shape (height, width) in the file's own dtype; an image stored as (1, H, W) or (H, W, 1), or grey
        stored as three equal channels, is brought to that shape.

    Raises:
        CellsError: no such file, an empty or damaged one, or more than one channel in it.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CellsError(f"no image at {path} ({error.strerror})") from error
    if not data:
        raise CellsError(f"{path} is empty")
    try:
        array = _decode(data, path)
    except CellsError:
        raise
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise CellsError(f"{path} is damaged: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    return _one_plane(array, path)


def read_channels(paths: Sequence[Path], size_px: tuple[int | None, int | None] = (None, None)) -> list[Plane]:
    """Read all channels of a site, in order.

    Args:
        paths: one file per channel.
        size_px: (height, width) that each must have; None allows any.

    Raises:
        CellsError: as `read_plane`; also when the channels differ in size, or from `size_px`.
    """
    planes = [read_plane(path) for path in paths]
    for path, plane in zip(paths, planes, strict=True):
        for side, found, told in zip(("height", "width"), plane.shape, size_px, strict=True):
            if told is not None and found != told:
                raise CellsError(f"{path} has {side} {found}, but dataset.images.{side} is {told}")
        if plane.shape != planes[0].shape:
            raise CellsError(f"{path} is {plane.shape} pixels, but {paths[0].name} of the same site {planes[0].shape}")
    return planes


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode 8-bit grey of shape (height, width) as PNG; quick rather than small."""
    return bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels), level=1, filter=16))


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """Decode a PNG whose checksums hold.

    Raises:
        CellsError: it is truncated, damaged or no PNG.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise CellsError("not a PNG")
    if data[-8:] != b"IEND\xaeB`\x82":
        raise CellsError("a truncated PNG")
    try:
        return np.asarray(imagecodecs.png_decode(data))
    except Exception as error:  # the decoder's own error type is not public
        raise CellsError(f"a damaged PNG: {str(error).splitlines()[0] if str(error) else 'undecodable'}") from error


def _decode(data: bytes, path: Path) -> Plane:
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        try:
            return decode_png(data)
        except CellsError as error:
            raise CellsError(f"{path} is {error}") from error
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return np.asarray(tifffile.imread(path))
    return np.asarray(imagecodecs.imread(str(path)))


def _one_plane(array: Plane, path: Path) -> Plane:
    shape = array.shape
    if array.ndim == 3 and 1 in shape:
        array = array.reshape([side for side in shape if side != 1])
    if array.ndim == 3 and shape[2] in (3, 4) and (array[..., :1] == array[..., :3]).all():
        array = array[..., 0]
    if array.ndim != 2:
        raise CellsError(f"{path} holds an array of {shape}: give one file per channel")
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "uif":
        raise CellsError(f"{path} holds {array.dtype}: give whole numbers or floats")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CellsError(f"{path} holds values that are not finite")
    return np.ascontiguousarray(array)
