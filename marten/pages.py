"""The pieces of a page in one file: it needs no server, no network and no other file, and prints as it is."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from modelspec import read_picture

_STYLE = Path(__file__).with_name("report.css")
_THUMBNAIL_PX = 256


def page(title: str, subtitle: str, headline: str, parts: Iterable[str]) -> str:
    """A whole page, as HTML text.

    Args:
        title: of the page and its first heading.
        subtitle: a line below it.
        headline: HTML beneath both, for instance from `headline`.
        parts: HTML of its sections; empty ones are left out.
    """
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head><body>"
    )
    top = f"<header><h1>{escape(title)}</h1><p class='soft'>{escape(subtitle)}</p>{headline}</header>"
    return head + "\n".join([top, "<main>", *(part for part in parts if part), "</main>"]) + "</body></html>\n"


def headline(cells: Iterable[tuple[str, str, str]]) -> str:
    """(name, value, what is said of it) of the few figures that matter most."""
    items = (
        f"<li>{escape(name)}<b>{escape(value)}</b><span class='soft'>{escape(told)}</span></li>"
        for name, value, told in cells
    )
    return f"<ul class='headline'>{''.join(items)}</ul>"


def section(title: str, inside: str) -> str:
    """A part of a page under its heading."""
    return f"<section><h2>{escape(title)}</h2>{inside}</section>"


def figure(picture: str, caption: str) -> str:
    """A chart with the words below it."""
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names its rows; a column "what it tells" holds words, the others figures."""
    words = [" class='words'" if name == "what it tells" else "" for name in heads]
    head = "".join(f"<th scope='col'{kind}>{escape(name)}</th>" for name, kind in zip(heads, words, strict=True))
    lines = []
    for first, *rest in rows:
        cells = [f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(rest, words[1:], strict=True)]
        lines.append(f"<tr><th scope='row'>{escape(first)}</th>{''.join(cells)}</tr>")
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return scrolling(whole, ", ".join(heads))


def scrolling(inside: str, name: str) -> str:
    """What may be wider than a phone."""
    return f"<div class='wide' tabindex='0' role='region' aria-label='{escape(name)}'>{inside}</div>"


def facts(told: Mapping[str, Any]) -> str:
    """Names and values."""
    lines = [
        f"<dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(plain(value))}</dd>" for key, value in told.items()
    ]
    return f"<dl>{''.join(lines)}</dl>"


def plain(value: Any) -> str:
    """A value as a person reads it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else "–" if value == "" else str(value)


def gallery(items: Iterable[tuple[Sequence[tuple[str, str]], str, str]]) -> str:
    """Pictures with what is said of them.

    Args:
        items: ((address, what it shows) of one or two pictures; what is said; a softer line below).
    """
    lines = []
    for pictures, told, softly in items:
        shown = "".join(f"<img src='{source}' alt='{escape(alt)}' loading='lazy'>" for source, alt in pictures)
        kind = "pair" if len(pictures) > 1 else "one"
        below = f"<br><span class='soft'>{escape(softly)}</span>" if softly else ""
        lines.append(f"<li><div class='{kind}'>{shown}</div>{escape(told)}{below}</li>")
    return f"<ul class='gallery'>{''.join(lines)}</ul>"


def thumbnail(source: bytes | Path) -> str:
    """A picture, small, as an address that holds it.

    Raises:
        PictureError: it cannot be read.
    """
    picture = read_picture(source, _THUMBNAIL_PX)
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=80)
    return jpeg_address(held.getvalue())


def jpeg_address(data: bytes) -> str:
    """A JPEG as an address that holds it."""
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"
