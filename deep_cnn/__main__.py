"""Train scenes or perception scores by the flags of recode-perceptions.

    python -m deep_cnn --epochs 5 --batch_size 32 --model resnet18 --data_dir places --lr 1e-4 --wandb=False
    python -m deep_cnn --model resnet18 --data_dir images --metadata meta --study_id 50a68a51fdc9f05596000002

Scenes lie in <root_dir>/<data_dir>/train/<class>/, those to judge by in val/<class>/; a fifth of train validates.
With --study_id, pictures are called LAT_LON_<location>_CITY.JPG, their scores lie in <metadata>/qscores.tsv, and 30 %
are kept back to judge by. Into <root_dir>/outputs go models/<run_name>.pth (the best epoch, with its card),
results/<run_name>.csv (epochs) and results/<run_name>.json (the test, done once, after training).
The same training with every other flag: train_main.py.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from marten.environment import enter_environment  # noqa: E402

if __name__ == "__main__":
    enter_environment(ROOT)
from marten.cli import Parser, run  # noqa: E402

KEYS = {"WB_KEY": "WANDB_API_KEY", "WB_PROJECT": "WANDB_PROJECT", "WB_USER": "WANDB_ENTITY"}
"""The original's names of what W&B reads from the environment."""


def yes_or_no(text: str) -> bool:
    """True or False from the word for it: to bool() every word was true, "False" too (B2-02)."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise ArgumentTypeError(f"True or False, found {text!r}")
    return words[text.lower()]


def build_parser() -> Parser:
    """The original's flags and defaults."""
    parser = Parser(prog="python -m deep_cnn", description=__doc__)
    add = parser.add_argument
    add("--epochs", type=int, default=20, metavar="N", help="times to go through the pictures")
    add("--batch_size", type=int, default=128, metavar="N", help="pictures per step")
    add("--model", default="resnet101", metavar="NAME", help="network: see train_main.py --help")
    add("--pre", default="resnet", metavar="NAME", help="preprocessing: of any network by name, or own of the model")
    add("--root_dir", type=Path, default=Path(), metavar="DIR", help="of the other folders; default: this one")
    add("--lr", type=float, default=1e-3, metavar="LR", help="learning rate")
    add("--run_name", default="default", metavar="NAME", help="of the files that the run leaves")
    add(
        "--data_dir",
        type=Path,
        default=Path("input/places365_standard"),
        metavar="DIR",
        help="pictures, below root_dir",
    )
    add("--wandb", type=yes_or_no, default=False, metavar="BOOL", help="tell W&B, with WB_KEY, WB_PROJECT and WB_USER")
    add("--study_id", default="", metavar="ID", help="train scores of this study of Place Pulse, not scenes")
    add("--metadata", type=Path, default=Path("input/meta"), metavar="DIR", help="holds qscores.tsv, below root_dir")
    add("--oversample", action="store_true", help="each tenth of the range of scores counts the same")
    add("--verbose", action="store_true", help="draw how scores are spread, into outputs/plots")
    add("--weights", default="auto", metavar="W", help="to start from: auto (ImageNet's), none or a state dict")
    add("--max_runtime", default="", metavar="T", help="checkpoint and exit 85 after this time, for instance 4h")
    add("--num_workers", type=int, default=-1, metavar="N", help="loader processes; default: as the processors allow")
    return parser


def main(args: Namespace) -> int:
    """Train, then judge once; returns the exit code."""
    from marten.errors import DONE
    from marten.settings import Settings

    for theirs, ours in KEYS.items():
        if os.environ.get(theirs):
            os.environ.setdefault(ours, os.environ[theirs])
    out = args.root_dir / "outputs"
    is_score = bool(args.study_id)
    data, test = scores(args, out) if is_score else scenes(args)
    settings = Settings(
        conv_net=args.model,
        data_dir=str(data),
        model_path=str(out / "models" / f"{args.run_name}.pth"),
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=(args.lr,),
        validation_split=0.07 if is_score else 0.2,  # of what is left of the whole: 65, 5 and 30 %
        seed=42,
        schedule="constant",
        augment="none",
        pre=args.pre,
        score_range=(1.0, 10.0) if is_score else (),
        weigh=("tenths",) if args.oversample else (),
        weights=args.weights,
        max_runtime=args.max_runtime,
        num_workers=args.num_workers,
        track=("wandb",) if args.wandb else (),
    )
    from marten.training import train

    code = train(settings)
    if code == DONE:
        from deep_cnn.results import judge

        judge(settings, test, out / "results" / f"{args.run_name}.csv")
    return code


def scenes(args: Namespace) -> tuple[Path, Path | None]:
    """(training pictures, those to judge by or None where there are none)."""
    from marten.errors import DataError

    folder = args.root_dir / args.data_dir
    if not (folder / "train").is_dir():
        raise DataError(f"no folder {folder / 'train'}: fetch it with scripts/data places, or name another --data_dir")
    return folder / "train", folder / "val" if (folder / "val").is_dir() else None


def scores(args: Namespace, out: Path) -> tuple[Path, Path]:
    """(table to train on, table to judge by), parted once and for good; written beside the pictures."""
    from deep_cnn.results import plot_spread
    from marten.datasets import inspect, split
    from marten.files import write_text
    from marten.scoretable import convert_place_pulse, find_scores
    from modelspec import Preprocess

    folder = args.root_dir / args.data_dir
    text, counts = convert_place_pulse(args.root_dir / args.metadata / "qscores.tsv", folder, args.study_id)
    print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
    whole = folder / "scores.csv"
    write_text(whole, text)
    pictures = inspect(find_scores(whole), Preprocess())
    _, kept_back = split(pictures.samples, 0.3, 42)
    back = {sample.id for sample in kept_back}
    head, *rows = text.splitlines(keepends=True)
    tables = folder / "scores_train.csv", folder / "scores_test.csv"
    for table, wanted in zip(tables, (False, True), strict=True):
        write_text(table, head + "".join(row for row in rows if (row.split(",")[0] in back) == wanted))
    if args.verbose:
        plot_spread(pictures.samples, back, out / "plots" / f"{args.run_name}.png")
    return tables


if __name__ == "__main__":
    run(main, build_parser())
