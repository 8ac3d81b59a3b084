"""Odd, damaged and hostile pictures, drawn by program from a seed: the same bytes at every run of one Pillow.

`odd_pictures` must all be answered; `bad_pictures` must each be refused with the status beside it. Nothing here is a
photograph, so nothing here has a licence.
"""

from __future__ import annotations

import base64
import io
import math
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageDraw, features

WIDTH, HEIGHT = 120, 90


def draw(seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """An RGB picture of a smooth ground with a few coloured shapes; no two quarters of it are alike."""
    rng = random.Random(seed)
    width, height = size
    phase = rng.random()
    ramp = [math.sin(phase + i / 40) for i in range(256)]
    ground = Image.linear_gradient("L").resize(size)
    side = ground.rotate(90).point([int(128 + 100 * v) for v in ramp])
    picture = Image.merge("RGB", (ground, side, side.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    brush = ImageDraw.Draw(picture)
    for i in range(5):
        x, y = rng.randrange(width), rng.randrange(height) / (1 + i % 2)
        radius = rng.uniform(0.05, 0.3) * min(size)
        colour = tuple(rng.randrange(256) for _ in range(3))
        box = (x - radius, y - radius, x + radius, y + radius)
        (brush.ellipse if i % 2 else brush.rectangle)(box, fill=colour)
    return picture


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def deep(seed: int, mode: str, top: float, bottom: float = 0.0) -> Image.Image:
    """A grey picture of 16-bit, 32-bit or float values from `bottom` to `top`."""
    values = [bottom + v / 255 * (top - bottom) for v in draw(seed).convert("L").tobytes()]
    if mode == "F":
        return Image.frombytes("F", (WIDTH, HEIGHT), struct.pack(f"={len(values)}f", *values))
    order, code = (">" if mode.endswith("B") else "="), ("i" if mode == "I" else "H")
    return Image.frombytes(mode, (WIDTH, HEIGHT), struct.pack(f"{order}{len(values)}{code}", *map(int, values)))


def png(width: int, height: int, depth: int, colour: int, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG assembled by hand: what Pillow cannot write, and headers that promise more than they hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + extra
        + _chunk(b"IDAT", zlib.compress(rows))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def oriented(seed: int, orientation: int, kind: str = "JPEG") -> bytes:
    """The picture `draw(seed)` stored turned, with the EXIF orientation (1..8) that turns it back."""
    turns = Image.Transpose
    stored_by = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }
    picture = draw(seed)
    if orientation in stored_by:
        picture = picture.transpose(stored_by[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    return encode(picture, kind, exif=exif, **options)


def odd_pictures(seed: int = 0) -> dict[str, bytes]:
    """Well-formed pictures of every kind that must be answered, by name; over sixty of them."""
    return dict(_odd(seed))


def _odd(seed: int) -> Iterator[tuple[str, bytes]]:
    rgb = draw(seed)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.radial_gradient("L").resize(rgb.size))
    modes = {
        "rgb": rgb,
        "grey": rgb.convert("L"),
        "bilevel": rgb.convert("1"),
        "palette": rgb.convert("P", palette=Image.Palette.ADAPTIVE),
        "rgba": alpha,
        "grey_alpha": alpha.convert("LA"),
        "cmyk": rgb.convert("CMYK"),
        "ycbcr": rgb.convert("YCbCr"),
    }
    modes["palette_alpha"] = modes["palette"].copy()
    modes["palette_alpha"].info["transparency"] = 3
    allowed = {
        "JPEG": ("rgb", "grey", "cmyk"),
        "PNG": ("rgb", "grey", "bilevel", "palette", "palette_alpha", "rgba", "grey_alpha"),
        "GIF": ("palette", "palette_alpha", "grey"),
        "WEBP": ("rgb", "rgba"),
        "AVIF": ("rgb", "rgba") if features.check("avif") else (),
        "BMP": ("rgb", "grey", "bilevel", "palette"),
        "TIFF": ("rgb", "grey", "bilevel", "palette", "rgba", "cmyk", "ycbcr"),
    }
    for kind, names in allowed.items():
        for name in names:
            yield f"{kind.lower()}_{name}", encode(modes[name], kind)
    yield "jpeg_progressive", encode(rgb, "JPEG", progressive=True, quality=90)
    yield "jpeg_444", encode(rgb, "JPEG", subsampling=0)
    yield "jpeg_large", encode(draw(seed, (2400, 1800)), "JPEG")
    yield "jpeg_trailing", encode(rgb, "JPEG") + b"<?php junk ?>" * 50
    yield "jpeg_broken_exif", encode(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        yield f"{compression}.tiff", encode(rgb, "TIFF", compression=compression)
    others = [draw(seed + i) for i in (1, 2)]
    yield "tiff_pages", encode(rgb, "TIFF", save_all=True, append_images=others)
    yield "gif_animated", encode(modes["palette"], "GIF", save_all=True, append_images=others, duration=50)
    yield "webp_animated", encode(rgb, "WEBP", save_all=True, append_images=others, lossless=True)
    yield "png_animated", encode(rgb, "PNG", save_all=True, append_images=others)
    yield "png_grey_16", encode(deep(seed, "I;16", 65535), "PNG")
    yield "png_rgb_transparent", encode(rgb, "PNG", transparency=(0, 0, 0))
    yield "png_interlaced_1px", png(1, 1, 8, 2, b"\0\x10\x80\xf0")
    wide = b"".join(b"\0" + bytes(6 * WIDTH) for _ in range(HEIGHT // 2))
    lit = b"".join(b"\0" + bytes([200, 1, 40, 1, 90, 1]) * WIDTH for _ in range(HEIGHT // 2))
    yield "png_rgb_16", png(WIDTH, HEIGHT // 2 * 2, 16, 2, wide + lit)
    yield "png_rgba_16", png(2, 1, 16, 6, b"\0" + bytes(range(16)))
    for mode, top, bottom in (
        ("I;16", 65535, 0),
        ("I;16B", 65535, 0),
        ("I;16", 4095, 0),
        ("I", 65535, 0),
        ("I", 30000, -30000),
        ("F", 1.0, 0),
        ("F", 255.0, 0),
        ("F", 1e6, -1e6),
    ):
        yield f"tiff_{mode.replace(';', '')}_{top:g}_{bottom:g}", encode(deep(seed, mode, top, bottom), "TIFF")
    yield "tiff_float_flat", encode(deep(seed, "F", 7e8, 7e8), "TIFF")
    yield "tiff_lab", encode(Image.merge("LAB", rgb.split()), "TIFF")
    for orientation in range(1, 9):
        yield f"jpeg_exif_{orientation}", oriented(seed, orientation)
    for kind in ("PNG", "WEBP", "TIFF"):
        yield f"{kind.lower()}_exif_6", oriented(seed, 6, kind)
    for width, height in ((1, 1), (1, 500), (500, 1), (2, 3), (999, 3), (1200, 12)):
        yield f"size_{width}x{height}", encode(draw(seed, (width, height)), "PNG")


def bad_pictures(seed: int = 0) -> dict[str, tuple[int, bytes]]:
    """What must be refused, by name: the HTTP status and the bytes."""
    return dict(_bad(seed))


def _bad(seed: int) -> Iterator[tuple[str, tuple[int, bytes]]]:
    rgb = draw(seed)
    jpeg, png_ = encode(rgb, "JPEG"), encode(rgb, "PNG")
    yield "empty", (400, b"")
    yield "text", (415, b"this is a sentence, not a picture")
    yield "html", (415, b"<!doctype html><p>a page")
    yield "pdf", (415, b"%PDF-1.7\n1 0 obj")
    yield "svg", (415, b'<svg xmlns="http://www.w3.org/2000/svg"/>')
    yield "zip", (415, b"PK\x03\x04" + bytes(60))
    yield "pickle", (415, b"\x80\x04\x95" + bytes(40))
    yield "random", (415, random.Random(seed).randbytes(2000))
    yield "heic", (415, b"\0\0\0\x18ftypheic" + bytes(40))
    yield "eps", (415, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    yield "ppm", (415, encode(rgb, "PPM"))
    yield "jpeg2000", (415, b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40))
    for share in (3, 20, 50, 90):
        yield f"jpeg_cut_{share}", (422, jpeg[: len(jpeg) * share // 100])
        yield f"png_cut_{share}", (422, png_[: len(png_) * share // 100])
    for kind in ("WEBP", "GIF", "BMP", "TIFF") + (("AVIF",) if features.check("avif") else ()):
        whole = encode(rgb, kind)
        yield f"{kind.lower()}_cut", (422, whole[: len(whole) * 6 // 10])
    flipped = bytearray(png_)
    flipped[len(png_) // 2] ^= 0x10
    yield "png_flipped", (422, bytes(flipped))
    yield "png_bad_header", (422, png_[:20] + b"\xff\xff" + png_[22:])
    yield "tiff_loop", (422, b"II*\0\x08\0\0\0\x01\0\0\x01\x03\0\x01\0\0\0\x10\0\0\0\x08\0\0\0")
    yield "tiff_infinite", (422, encode(deep(seed, "F", math.inf), "TIFF"))
    yield "long", (422, encode(Image.new("L", (1, 10_000)), "PNG"))
    yield "bomb_png", (413, png(20_000, 20_000, 1, 0, bytes(2000)))
    yield "bomb_png_below_pillows_limit", (413, png(9_400, 9_400, 8, 2, bytes(2000)))
    start = jpeg.index(b"\xff\xc0") + 5
    yield "bomb_jpeg", (413, jpeg[:start] + b"\xff\xff\xff\xff" + jpeg[start + 4 :])
    gif = encode(rgb.convert("P"), "GIF")
    yield "bomb_gif", (413, gif[:6] + b"\xff\xff\xff\xff" + gif[10:])
    bmp = encode(rgb, "BMP")
    yield "bomb_bmp", (413, bmp[:18] + struct.pack("<ii", 65_535, 65_535) + bmp[26:])
    lossless = b"\x2f" + struct.pack("<I", 10_999 | (10_999 << 14)) + b"\x88\x88\x08" + bytes(6)
    body = b"WEBPVP8L" + struct.pack("<I", len(lossless)) + lossless
    yield "bomb_webp", (413, b"RIFF" + struct.pack("<I", len(body)) + body)


def as_base64(data: bytes) -> str:
    """Plain base64 text of some bytes."""
    return base64.b64encode(data).decode("ascii")
