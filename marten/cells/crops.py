"""From an image and the centres of its cells to crops: where the samples lie, which pixels belong to the cell.

Two geometries. "parity" samples bilinearly as TensorFlow's crop_and_resize does with normalised boxes: the grid's
pitch is box (H - 1) / (H (box - 1)), 1.0069 for a box of 128 in 1080 pixels, so it is no slice of pixels. "slice" is
that slice: whole pixels, faster, and up to a pixel away at the crop's rim. Outside the image both give 0.

Source: TensorFlow's crop_and_resize (extrapolation value 0), checked against crops that DeepProfiler exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import skimage.measure
from numpy.typing import NDArray

from marten.cells.errors import CellsError
from marten.cells.images import Plane
from marten.cells.locations import Centres

GEOMETRIES = ("parity", "slice")
EPSILON = np.float32(1e-7)
Crops = NDArray[np.float32]
"""Crops of shape (cells, channels, height, width)."""


def take_crops(
    planes: Sequence[Plane], centres: Centres, box_px: int, view_px: int | None = None, geometry: str = "parity"
) -> Crops:
    """Cut one crop per centre out of all channels, values untouched.

    Args:
        planes: one array of (height, width) per channel, all of one size, any dtype.
        centres: (cells, 2), column X and row Y in pixels.
        box_px: side of the crop.
        view_px: side of what it shows in the image, when that is not `box_px`; only "parity" can scale.
        geometry: "parity" or "slice".

    Returns:
        float32 of shape (cells, channels, box_px, box_px); samples outside the image are 0.
    """
    view = view_px or box_px
    if geometry not in GEOMETRIES:
        raise CellsError(f"no crop geometry {geometry!r}: choose one of {', '.join(GEOMETRIES)}")
    crops_NCHW = np.zeros((len(centres), len(planes), box_px, box_px), np.float32)
    for number, (x, y) in enumerate(centres):
        if geometry == "slice" and view == box_px:
            _cut_slice(planes, float(x), float(y), crops_NCHW[number])
        else:
            _cut_bilinear(planes, float(x), float(y), view, crops_NCHW[number])
    return crops_NCHW


def _cut_slice(planes: Sequence[Plane], x: float, y: float, out_CHW: Crops) -> None:
    box = out_CHW.shape[-1]
    height, width = planes[0].shape
    left, top = int(np.floor(x)) - box // 2, int(np.floor(y)) - box // 2
    x0, x1, y0, y1 = max(left, 0), min(left + box, width), max(top, 0), min(top + box, height)
    if x0 < x1 and y0 < y1:
        for channel, plane in enumerate(planes):
            out_CHW[channel, y0 - top : y1 - top, x0 - left : x1 - left] = plane[y0:y1, x0:x1]


def _cut_bilinear(planes: Sequence[Plane], x: float, y: float, view: int, out_CHW: Crops) -> None:
    box = out_CHW.shape[-1]
    height, width = planes[0].shape
    low_y, high_y, share_y, rows = _taps(y, view, box, height)
    low_x, high_x, share_x, columns = _taps(x, view, box, width)
    if not len(low_y) or not len(low_x):
        return
    top, left = low_y[0], low_x[0]
    for channel, plane in enumerate(planes):
        window = plane[top : high_y[-1] + 1, left : high_x[-1] + 1].astype(np.float32)
        # columns first, then rows, as TensorFlow does: masks compare the results exactly
        nearer, further = window[:, low_x - left], window[:, high_x - left]
        further -= nearer
        further *= share_x
        nearer += further
        upper, lower = nearer[low_y - top], nearer[high_y - top]
        lower -= upper
        lower *= share_y[:, None]
        upper += lower
        out_CHW[channel, rows, columns] = upper


def _taps(
    centre: float, view: int, box: int, size: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32], slice]:
    """Where one axis of a crop is sampled: lower and upper pixel, share of the upper, and which samples are inside."""
    first = np.float32((centre - view / 2) / size)
    last = np.float32((centre + view / 2) / size)
    pitch = (last - first) * np.float32(size - 1) / np.float32(max(box - 1, 1))
    at = first * np.float32(size - 1) + np.arange(box, dtype=np.float32) * pitch
    inside = np.flatnonzero((at >= 0) & (at <= size - 1))
    at = at[inside]
    low = np.floor(at)
    rows = slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)
    return low.astype(np.intp), np.ceil(at).astype(np.intp), at - low, rows


def label_regions(outline: Plane) -> NDArray[np.int32]:
    """Number the regions between a site's outlines: every connected patch of equal value gets its own number.

    Args:
        outline: (height, width), 0 and 255 as CellProfiler draws them. No pixel equals the background value 1, so the
            outlines and the space between the cells are numbered as well, exactly as DeepProfiler numbers them.
    """
    label: Any = skimage.measure.label
    return np.asarray(label(outline, background=1), np.int32)


def take_masks(
    regions: NDArray[np.int32], centres: Centres, box_px: int, geometry: str = "parity"
) -> NDArray[np.bool_]:
    """Tell which pixels of each crop belong to the cell in its middle.

    Args:
        regions: of `label_regions`.
        centres: (cells, 2), column X and row Y.
        box_px: side of the crop.
        geometry: that of the crops. With "parity", pixels between two regions belong to neither.

    Returns:
        bool of shape (cells, box_px, box_px).
    """
    cropped = take_crops([regions], centres, box_px, geometry=geometry)[:, 0]
    return np.asarray(cropped == cell_regions(regions, centres)[:, None, None])


def cell_regions(regions: NDArray[np.int32], centres: Centres) -> NDArray[np.float32]:
    """Number of the region that each cell is: the median over 10 by 10 pixels around its centre; 0 outside."""
    numbers = np.zeros(len(centres), np.float32)
    for number, (x, y) in enumerate(centres.astype(np.int64)):
        patch = regions[max(y - 5, 0) : max(y + 5, 0), max(x - 5, 0) : max(x + 5, 0)]
        numbers[number] = int(np.median(patch)) if patch.size else 0
    return numbers


def normalise(crops_NCHW: Crops) -> Crops:
    """Stretch every channel of every crop from its own minimum and maximum to 0..1, in place.

    (c - min) / (max - min + 1e-7): absolute intensity is thrown away by design; a flat channel becomes all 0.
    """
    low = crops_NCHW.min(axis=(2, 3), keepdims=True)
    span = crops_NCHW.max(axis=(2, 3), keepdims=True) - low
    crops_NCHW -= low
    crops_NCHW /= span + EPSILON
    return crops_NCHW


def to_strips(crops_NCHW: Crops, masks: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """Lay normalised channels side by side as 8-bit grey, the mask last.

    Returns:
        uint8 of shape (cells, box, box * channels), or box * (channels + 1) with masks.
    """
    cells, channels, box, _ = crops_NCHW.shape
    extra = 0 if masks is None else 1
    strips = np.empty((cells, box, (channels + extra) * box), np.uint8)
    tops = crops_NCHW.max(axis=(1, 2, 3), initial=0)
    # an image of small floats can stretch to less than 1; the strip as a whole always reaches 255
    gains = np.where(tops > 0, np.float32(255) / np.where(tops > 0, tops, 1), 0).astype(np.float32)
    if masks is not None:
        gains = np.full_like(gains, 255)
    for channel in range(channels):
        strips[:, :, channel * box : (channel + 1) * box] = crops_NCHW[:, channel] * gains[:, None, None]
    if masks is not None:
        strips[:, :, channels * box :] = masks * np.uint8(255)
    return strips


def from_strips(strips: NDArray[np.uint8], channels: int, masked: bool = False) -> Crops:
    """Fold strips back into crops of values 0..1.

    Args:
        strips: uint8 of shape (cells, box, box * channels) or, with a mask strip, box * (channels + 1).
        channels: how many channels, without the mask.
        masked: black out what the mask strip does not cover; refused where there is none.

    Returns:
        float32 of shape (cells, channels, box, box).
    """
    cells, box, length = strips.shape
    if length not in (box * channels, box * (channels + 1)):
        raise CellsError(f"a strip of {box} x {length} pixels does not hold {channels} channels")
    if masked and length != box * (channels + 1):
        raise CellsError("these crops were exported without masks: export them anew, or set mask_objects to false")
    planes = strips.reshape(cells, box, length // box, box).transpose(0, 2, 1, 3)
    crops_NCHW = planes[:, :channels].astype(np.float32) / np.float32(255)
    if masked:
        crops_NCHW *= planes[:, channels:] > 0
    return crops_NCHW
