#!/usr/bin/env python3
"""Train an image classifier on a folder of labelled pictures.

    python train_main.py --conv_net base_cnn --data_dir data --epochs 10
    python train_main.py --conv_net efficientnet_lite0 --data_dir data --freeze 2 --lr 1e-3 1e-4 --epochs 6
    python train_main.py --conv_net vgg --weights vgg19_bn.pth --dropout 0.5 --epochs 3

Pictures lie flat (cat.0.jpg, dog.0.jpg), in one folder per class, or are listed in a .csv with path and label; one
with path and score trains a regression, whose answer is a number.
The best state dict goes to --model_path, its card beside it as .json, and metrics.jsonl, curves.png and split.csv
into the .run folder beside both. A stopped run (SIGTERM, SIGUSR1, Ctrl-C, --max_runtime) exits 85 and is resumed,
exactly, by the same command.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from marten.environment import enter_environment

if __name__ == "__main__":
    enter_environment(Path(__file__).resolve().parent)

from marten.architectures import known_architectures
from marten.cli import Parser, one_of_several, run
from marten.settings import Settings, settings_from


def build_parser() -> Parser:
    """The flags, as the owner spells them; defaults are those of `Settings`."""
    parser = Parser(prog="train_main.py", description=__doc__, config=True)
    standard = Settings()
    add = parser.add_argument_group

    what = add("what is trained on what").add_argument
    names = ", ".join(known_architectures())
    what("-cn", "--conv_net", default=standard.conv_net, metavar="NAME", help=f"network: {names}")
    what("--data_dir", default=standard.data_dir, metavar="DIR", help="folder of pictures, or a .csv")
    what(
        "-p",
        "--model_path",
        default="",
        metavar="PTH",
        help="state dict to write; default: models/model_<conv_net>.pth",
    )
    what("--weights", default="auto", metavar="W", help="auto, none, imagenet, or a state dict to start from")
    what(
        "--pre",
        default=standard.pre,
        metavar="P",
        help="preprocessing: the network's own, or that of the one named",
    )
    what("--on_bad", default="skip", choices=("skip", "refuse"), help="what to do about files that are no pictures")
    what(
        "-v",
        "--validation_split",
        type=float,
        default=standard.validation_split,
        metavar="SHARE",
        help="of each class kept back to judge by, 0 <= share < 1",
    )
    what(
        "--seed",
        type=int,
        default=standard.seed,
        metavar="N",
        help="of the split, weights, order, augmentation (default: 0)",
    )

    how = add("how").add_argument
    how("-e", "--epochs", type=int, default=standard.epochs, metavar="N", help="times to go through the pictures")
    how("-b", "--batch_size", type=int, default=standard.batch_size, metavar="N", help="pictures per step")
    how(
        "-lr",
        "--lr",
        type=float,
        nargs="+",
        default=list(standard.lr),
        metavar="LR",
        help="learning rate of the head [and another of the backbone] (default: 0.001)",
    )
    how(
        "--schedule",
        default=standard.schedule,
        metavar="S",
        help="of the learning rate: constant, cosine, step, onecycle or finetune",
    )
    how("-wd", "--weight_decay", type=float, default=standard.weight_decay, metavar="WD", help="decoupled, as in AdamW")
    how(
        "-bet",
        "--betas",
        type=float,
        nargs=2,
        default=list(standard.betas),
        metavar=("B1", "B2"),
        help="of Adam (default: 0.9 0.999)",
    )
    how("-d", "--dropout", type=float, default=standard.dropout, metavar="SHARE", help="of units left out in a step")
    how("--label_smoothing", type=float, default=0.0, metavar="SHARE", help="of each label given to all classes")
    how(
        "--augment",
        default=standard.augment,
        metavar="A",
        help="changes of pictures in training: none, flip, light, standard or strong",
    )
    how(
        "--freeze",
        default=standard.freeze,
        metavar="F",
        help="what learns only in its head: none, backbone, or N, the backbone in the first N epochs",
    )
    how("--loss", default="auto", metavar="L", help="of scores: mse (auto) or huber; of classes: cross-entropy (auto)")
    how("--score_range", type=float, nargs=2, default=[], metavar=("LOW", "HIGH"), help="answer scores on this scale")
    how(
        "--weigh",
        nargs="+",
        default=[],
        metavar="W",
        help="errors of scores by votes, tenths (of the range, equally) or both",
    )
    how("--mix", default="none", metavar="M", help="pictures of a batch with each other: none, mixup, cutmix or both")
    how("--ema", type=float, default=0.0, metavar="DECAY", help="validate and keep a running average of the weights")
    how("--mirror", action="store_true", help="answer by a picture and its mirror image, at twice the cost")
    how("--early_stop", type=int, default=0, metavar="N", help="stop after N epochs without a better validation loss")

    where = add("where, and for how long").add_argument
    where("--device", default="auto", metavar="D", help="auto, cpu, cuda or mps")
    where("--precision", default="auto", metavar="P", help="auto, fp32, bf16 or fp16")
    where("--batch_norm", default="shared", metavar="B", help="of several processes: over all pictures (shared) or own")
    where("--num_workers", type=int, default=-1, metavar="N", help="loader processes; default: as the processors allow")
    where(
        "--checkpoint_every", default="", metavar="T", help="how often: 2 (epochs) or 30min; default: only when stopped"
    )
    where("--max_runtime", default="", metavar="T", help="checkpoint and exit 85 after this time, for instance 4h")
    where("--self_checkpoint", action="store_true", help="exit 85 after each checkpoint, for HTCondor")
    where(
        "--track", nargs="+", default=[], metavar="T", help="tell tensorboard, wandb, mlflow of each epoch (or several)"
    )
    where("--find_lr", action="store_true", help="do not train: try rising learning rates, draw the loss, name one")
    return parser


def main(args: argparse.Namespace) -> int:
    """Train as the flags say; returns the exit code."""
    settings = settings_from(args)
    if args.find_lr:
        from marten.ratefinder import find_rate

        return find_rate(settings)
    if one_of_several():
        # torch would advise each process, in every log, against a choice that marten.learner makes with reason
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from marten.training import train

    return train(settings)


if __name__ == "__main__":
    run(main, build_parser())
