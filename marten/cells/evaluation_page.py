"""One HTML page of an evaluation, complete in itself: numbers, tables and pictures, to be mailed or archived."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marten.cells.tables import Table
from marten.files import write_text

_MOST_ROWS = 60
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b2430 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dae1 }
table { border-collapse: collapse; margin: .8rem 0 } td, th { padding: .2rem .8rem .2rem 0; text-align: left }
th { color: #5a6676; font-weight: 600 } td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; height: auto } p.note { color: #5a6676 }
"""
_TOLD = {
    "activity": "Each treatment's replicates against the controls (copairs, permutation p values, corrected).",
    "consistency": "Each treatment's replicates against all other profiles.",
    "group": "Members of each larger group against all other profiles.",
    "precision_recall": "Replicates among the k most similar pairs of each treatment.",
    "enrichment": "Odds that the most similar pairs are replicates, over the odds of the others (Fisher).",
    "hits": "Replicates found among the nearest neighbours, beyond what chance would put there.",
    "grit": "Similarity to the same treatment's other wells, in standard deviations of the similarity to controls.",
}


def write_page(
    path: Path,
    about: Mapping[str, Any],
    measures: Mapping[str, float | int | str],
    tables: Mapping[str, Table],
    similarity: NDArray[np.float64],
    labels: NDArray[np.str_],
    profiles: NDArray[np.float64],
) -> None:
    """Write the page.

    Args:
        path: of the page.
        about: what was evaluated.
        measures: one number each.
        tables: by name; long ones are shown in part, their CSV files lie beside the page.
        similarity: of all profiles, in the order of `labels`.
        labels: treatment of each.
        profiles: (rows, features), for the map of two components.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Profiles, evaluated</title>",
        f"<style>{_STYLE}</style><h1>Profiles, evaluated</h1>",
        _list(about),
        "<h2>Measures</h2>",
        _list(measures),
        "<h2>Similarity of all profiles</h2>",
        _picture(_draw_similarity(similarity, labels), "similarity matrix"),
        "<h2>Profiles on their two main components</h2>",
        _picture(_draw_map(profiles, labels), "map of profiles"),
    ]
    for name, table in tables.items():
        parts += [f"<h2>{html.escape(name.replace('_', ' '))}</h2>", f"<p class=note>{_TOLD.get(name, '')}</p>"]
        if name == "activity" and len(table):
            parts.append(_picture(_draw_activity(table), "mean average precision"))
        parts.append(_table(table, name))
    write_text(path, "\n".join(parts) + "\n")


def _list(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{html.escape(str(k))}</th>{_cell(v)}</tr>" for k, v in values.items())
    return f"<table>{rows}</table>"


def _table(table: Table, name: str) -> str:
    head = "".join(f"<th>{html.escape(str(column).replace('_', ' '))}</th>" for column in table.columns)
    rows = (table.iloc[number] for number in range(min(len(table), _MOST_ROWS)))
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    rest = len(table) - _MOST_ROWS
    more = f"<p class=note>{rest} more rows in {html.escape(name)}.csv</p>" if rest > 0 else ""
    return f"<table><tr>{head}</tr>{body}</table>{more}"


def _cell(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, (float, np.floating)):
        return f"<td class=number>{value:.4g}</td>"
    kind = " class=number" if isinstance(value, (int, np.integer)) else ""
    return f"<td{kind}>{html.escape(str(value))}</td>"


def _picture(data: bytes, told: str) -> str:
    return f'<img alt="{told}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_similarity(similarity: NDArray[np.float64], labels: NDArray[np.str_]) -> bytes:
    order = np.argsort(labels, kind="stable")
    step = max(1, len(order) // 1500)
    order = order[::step]
    figure, axes = _figure(7, 6)
    shown = axes.imshow(similarity[np.ix_(order, order)], vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="similarity")
    names, starts = np.unique(labels[order], return_index=True)
    if len(names) <= 40:
        axes.set_yticks(starts, names, fontsize=7)
        axes.set_xticks([])
    for start in starts[1:] if len(names) <= 40 else ():
        axes.axhline(start - 0.5, color="white", linewidth=0.6)
        axes.axvline(start - 0.5, color="white", linewidth=0.6)
    return _png(figure)


def _draw_map(profiles: NDArray[np.float64], labels: NDArray[np.str_]) -> bytes:
    centred = profiles - profiles.mean(axis=0)
    vectors, scales, _ = np.linalg.svd(centred, full_matrices=False)
    places = (vectors * scales)[:, :2]
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    share = scales**2 / max(float((scales**2).sum()), 1e-30)
    figure, axes = _figure(7, 5)
    names = np.unique(labels)
    for name in names:
        mine = places[labels == name]
        axes.scatter(mine[:, 0], mine[:, 1], s=18, label=str(name) if len(names) <= 12 else None)
    axes.set_xlabel(f"first component, {100 * share[0]:.0f} % of the variance")
    axes.set_ylabel(f"second component, {100 * share[1]:.0f} %" if len(share) > 1 else "second component")
    if len(names) <= 12:
        axes.legend(fontsize=8)
    return _png(figure)


def _draw_activity(table: Table) -> bytes:
    figure, axes = _figure(7, 4)
    p_values = np.maximum(table["corrected_p_value"].to_numpy(float), 1e-6)
    axes.scatter(table["mean_average_precision"], -np.log10(p_values), s=18)
    axes.axhline(-np.log10(0.05), color="grey", linewidth=0.8)
    if len(table) <= 20:
        for place, (_, row) in zip(-np.log10(p_values), table.iterrows(), strict=True):
            axes.annotate(str(row.iloc[0]), (row["mean_average_precision"], place), fontsize=7)
    axes.set_xlabel("mean average precision against controls")
    axes.set_ylabel("-log10 corrected p value")
    return _png(figure)
