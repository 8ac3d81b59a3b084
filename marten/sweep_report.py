"""One page about a sweep: its runs, their curves, which settings mattered, and how they go together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from marten.charts import chart, parallel
from marten.pages import facts, figure, headline, page, scrolling, section, table
from marten.report import told_share
from marten.sweep_results import Result, loss_of
from modelspec import ModelCard

_CURVES = 4
_LEAST = 5
"""Runs below which no importance is told: it would be an accident."""


def sweep_page(folder: Path, found: Sequence[Result]) -> str:
    """The page, as HTML text.

    Args:
        folder: of the sweep.
        found: its runs, the best first.
    """
    begun = [result for result in found if result.history]
    states = [sum(r.state == state for r in found) for state in ("finished", "pruned", "unfinished")]
    cells = [("runs", str(len(found)), f"{states[0]} finished, {states[1]} ended early, {states[2]} under way")]
    if begun:
        best = begun[0]
        measure, word = _measure(begun)
        cells.append(("lowest validation loss", f"{best.loss:.4f}", f"run {best.name}, epoch {best.best['epoch']}"))
        if measure in best.best:
            cells.append((word, f"{best.best[measure]:.4f}", "of that run, which was chosen by its loss"))
    parts = [_importance(begun), _together(begun), _curves(begun), _runs(found), _origin(begun)]
    note = (
        "All figures are of the validation part, by which runs were chosen: the best of many is a little too good."
        " A test set is asked once, at the end, by scripts/evaluate."
    )
    return page(f"Sweep {folder.name}", note, headline(cells), parts)


def importances(found: Sequence[Result]) -> dict[str, float]:
    """Which settings decided between good and other runs, as shares of 1, the largest first.

    Empty where fewer than five runs have an epoch behind them, where no setting varies, or without Optuna.

    Source: Watanabe, Bansal and Hutter 2023, PED-ANOVA (arXiv 2304.10255), as in Optuna.
    """
    varied = _varied(found)
    losses = [result.loss for result in found]
    if len(found) < _LEAST or not varied or min(losses) == max(losses):
        return {}
    try:
        import optuna
    except ImportError:
        return {}
    distributions: dict[str, Any] = {}
    for name, values in varied.items():
        numbers = [value for value in values if isinstance(value, float)]
        if len(numbers) < len(values):
            distributions[name] = optuna.distributions.CategoricalDistribution(sorted({str(v) for v in values}))
        else:
            by_log = min(numbers) > 0 and max(numbers) / min(numbers) >= 30
            distributions[name] = optuna.distributions.FloatDistribution(min(numbers), max(numbers), log=by_log)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    for number, loss in enumerate(losses):
        params = {
            name: values[number]
            if isinstance(distributions[name], optuna.distributions.FloatDistribution)
            else str(values[number])
            for name, values in varied.items()
        }
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=loss))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself an experiment
        # at least four runs are the good ones
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, 4 / len(losses))))
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: share for name, share in shares.items() if math.isfinite(share)}


def _varied(found: Sequence[Result]) -> dict[str, list[str | float]]:
    """Each setting that not all runs share, with its value in each; numbers where all are."""
    keys = dict.fromkeys(key for result in found for key in result.settings)
    columns: dict[str, list[str | float]] = {}
    for key in keys:
        words = [result.settings.get(key, "") for result in found]
        if len(set(words)) > 1:
            try:
                columns[key] = [float(word) for word in words]
            except ValueError:
                columns[key] = list(words)
    return columns


def _measure(found: Sequence[Result]) -> tuple[str, str]:
    is_score = any("validation_mae" in result.best for result in found)
    return ("validation_mae", "mean absolute error") if is_score else ("validation_accuracy", "validation accuracy")


def _importance(begun: Sequence[Result]) -> str:
    shares = importances(begun)
    if not shares:
        return ""
    lines = [
        f"<tr><th scope='row'>{escape(name)}</th><td>{100 * share:.0f} %</td>"
        f"<td class='bar'><i style='--share:{share / max(shares.values()):.4f}'></i></td></tr>"
        for name, share in shares.items()
    ]
    heads = "".join(f"<th scope='col'>{name}</th>" for name in ("setting", "importance", "beside the largest"))
    note = (
        f"<p class='soft'>By how much each setting tells the better runs from the others (PED-ANOVA), over {len(begun)}"
        " runs; with few runs a hint, no proof.</p>"
    )
    whole = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return section("Which settings mattered", note + scrolling(whole, "importance of each setting"))


def _together(begun: Sequence[Result]) -> str:
    varied = _varied(begun)
    if len(begun) < 2 or not varied:
        return ""
    losses = [result.loss for result in begun]
    told = f"{len(begun)} runs over {', '.join(varied)} and the validation loss; the best has {min(losses):.4f}"
    drawn = parallel(told, {**varied, "loss": losses}, losses)
    caption = "Each line is a run; the better, the darker, and the best in another colour."
    return section("How settings go together", scrolling(figure(drawn, caption), "runs over their settings"))


def _curves(begun: Sequence[Result]) -> str:
    if not begun:
        return ""
    shown = begun[:_CURVES]
    series = {f"run {r.name}": [(row["epoch"], loss_of(row)) for row in r.history] for r in shown}
    ends = "; ".join(f"{name} to {points[-1][1]:.3f}" for name, points in series.items())
    drawn = [figure(chart(f"validation loss by epoch: {ends}", series, "epoch", "validation loss"), "Validation loss")]
    measure, word = _measure(begun)
    series = {f"run {r.name}": [(row["epoch"], row[measure]) for row in r.history if measure in row] for r in shown}
    series = {name: points for name, points in series.items() if points}
    if series:
        drawn.append(figure(chart(f"{word} by epoch", series, "epoch", word), word.capitalize()))
    title = "Its curves" if len(shown) == 1 else f"Curves of the best {len(shown)}"
    return section(title, f"<div class='charts'>{''.join(drawn)}</div>")


def _runs(found: Sequence[Result]) -> str:
    keys = list(dict.fromkeys(key for result in found for key in result.settings))
    measure, word = _measure(found)
    rows = [
        (
            r.name,
            *(r.settings.get(key, "–") for key in keys),
            str(r.epochs),
            f"{r.loss:.4f}" if r.history else "–",
            f"{r.best[measure]:.4f}" if measure in r.best else "–",
            r.state,
        )
        for r in found
    ]
    return section("Runs, the best first", table(("run", *keys, "epochs done", "loss", word, "state"), rows))


def _origin(begun: Sequence[Result]) -> str:
    """The best run's data, command and versions: what all have in common, but for its own settings."""
    best = next((r for r in begun if r.weights.with_suffix(".json").is_file()), None)
    if best is None:
        return ""
    card = ModelCard.read(best.weights.with_suffix(".json"))
    data = {key: value for key, value in card.data.items() if isinstance(value, str | int)}
    figures = {
        key.replace("_", " "): told_share(one)
        for key, one in card.metrics.items()
        if isinstance(one, dict) and "value" in one
    }
    command = str(card.provenance.get("command", ""))
    shown = f"<pre tabindex='0'>{escape(command)}</pre>" if command else ""
    rest = {key: value for key, value in card.provenance.items() if key != "command"}
    return section(f"The best run, {best.name}", facts({**figures, **data}) + shown + facts(rest))
