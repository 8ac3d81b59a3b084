"""What a run of deep_cnn leaves beside its model: a table of epochs, the test's figures, how the scores are spread."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from marten.datasets import Sample
from marten.devices import choose_runtime
from marten.evaluate import ask, evaluate, pictures_to_ask
from marten.files import replacing, write_text
from marten.progress import say
from marten.settings import Settings
from marten.weights import load_model


def judge(settings: Settings, test: Path | None, table: Path) -> None:
    """Write the table of epochs; ask the best weights of the test pictures, once, and write what they are worth.

    Args:
        settings: of the finished run.
        test: pictures that no part of the training saw; None where there are none.
        table: .csv to write, with a .json beside it.
    """
    lines = (settings.run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    is_score = "train_mae" in history[0]
    names = (
        "train_loss",
        "val_loss",
        *(("train_mae", "val_mae") if is_score else ("train_precision@1", "val_precision@1")),
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("epoch", *names))
    for row in history:
        second = [row.get(f"{part}_{'mae' if is_score else 'accuracy'}") for part in ("train", "validation")]
        percent = [value if is_score or value is None else 100 * value for value in second]
        writer.writerow((row["epoch"], row["train_loss"], row.get("validation_loss"), *percent))
    write_text(table, text.getvalue())
    best = min(history, key=lambda row: row.get("validation_loss", row["train_loss"]))
    told = f"LOSS train {best['train_loss']:.4f} valid {best.get('validation_loss', float('nan')):.4f}"
    if test is None:
        say(f"{told}; there is no folder val to test with")
        return
    network, card = load_model(settings.weights_path)
    device = choose_runtime(settings.device, "fp32").device
    pictures, part = pictures_to_ask(card, test, "all")
    logits_NK = ask(network.to(device), card.spec, pictures.samples, device, settings.batch_size)
    scores = evaluate(card.spec, pictures, part, logits_NK).scores
    write_text(table.with_suffix(".json"), json.dumps(scores, indent=2) + "\n")
    figures = {name: scores[name] for name in ("mae", "rmse", "r2", "spearman") if scores.get(name)}
    figures |= {f"precision@{k}": share for k, share in scores.get("precision_at_k", {}).items()}
    loss = scores["log_loss"]["value"] if "log_loss" in scores else scores["rmse"]["value"] ** 2
    say(f"{told} test {loss:.4f}, on {scores['count']} pictures")
    for name, one in figures.items():
        low, high = one["interval_95"]
        say(f"  test {name} {one['value']:.4f} [{low:.4f}, {high:.4f}]")


def plot_spread(samples: Sequence[Sample], kept_back: Collection[str], path: Path) -> None:
    """Draw how the scores of the two parts are spread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    parts = [
        [s.score for s in samples if (s.id in kept_back) == back and s.score is not None] for back in (False, True)
    ]
    titles = (f"to learn from ({len(parts[0])})", f"to judge by ({len(parts[1])})")
    axes.hist(parts, bins=20, density=True, label=titles, color=["#8a8f98", "#1f6feb"])
    axes.set_xlabel("score")
    axes.set_ylabel("density")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as neighbour:
        figure.savefig(neighbour, format="png", dpi=110)
