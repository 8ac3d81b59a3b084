#!/usr/bin/env python3
"""Tell what is on a picture, exactly as the server would.

    python predict_main.py --conv_net vgg --img_path data/test1/1.jpg
    python predict_main.py --model_path models/model_vgg.pth --img_path data/test1 'holiday/*.jpg' --topk 2
    python predict_main.py --img_path cat.jpg --save answers      # answers/cat.png, with its label

The card beside the weights says everything else: network, classes, preprocessing. Several pictures are answered in
order; one that cannot be read is named on stderr, the others are answered, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from marten.environment import enter_environment

if __name__ == "__main__":
    enter_environment(Path(__file__).resolve().parent)

from marten.cli import Parser, run
from marten.errors import DONE, FAILED, UsageError
from marten.files import MODELS


def build_parser() -> Parser:
    """The flags, as the owner spells them."""
    parser = Parser(prog="predict_main.py", description=__doc__)
    add = parser.add_argument
    add(
        "-cn",
        "--conv_net",
        default="",
        metavar="NAME",
        help="network; with no --model_path, models/model_<NAME>.pth (vgg)",
    )
    add(
        "-i",
        "--img_path",
        nargs="+",
        default=["data/test1/1.jpg"],
        metavar="IMG",
        help="pictures, folders or patterns (default: data/test1/1.jpg)",
    )
    add("-p", "--model_path", default="", metavar="PTH", help="state dict, its card beside it")
    add("--topk", type=int, metavar="K", help="labels per answer; default: as the card says")
    add("--json", action="store_true", help="one JSON object per picture, as the server answers")
    add("--save", type=Path, metavar="DIR", help="write each picture with its label under it")
    add("--show", action="store_true", help="open each picture with its label")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda or mps (default: auto)")
    return parser


def main(args: argparse.Namespace) -> int:
    """Answer every picture; returns the exit code."""
    if args.topk is not None and args.topk < 1:
        raise UsageError(f"--topk must be at least 1, found {args.topk}")
    path = Path(args.model_path) if args.model_path else MODELS / f"model_{args.conv_net or 'vgg'}.pth"
    from marten.devices import choose_runtime
    from marten.predict import caption_files, predict, save_captioned, show_captioned
    from marten.weights import load_model
    from marten.wording import answer_text, expand_paths

    paths = expand_paths(args.img_path)
    network, card = load_model(path)
    if args.conv_net not in ("", card.spec.name, card.spec.arch, card.training.get("conv_net")):
        raise UsageError(f"{path} holds a {card.spec.name}, not a {args.conv_net}: leave --conv_net out")
    device = choose_runtime(args.device, "fp32").device
    code = DONE
    targets = caption_files(paths, args.save) if args.save else []
    for number, prediction in enumerate(predict(network.to(device), card.spec, paths, device, args.topk)):
        if prediction.answer is None:
            print(f"{prediction.path}: {prediction.reason}", file=sys.stderr)
            code = FAILED
            continue
        text = answer_text(prediction.answer)
        if args.json:
            print(json.dumps({"path": str(prediction.path), **prediction.answer}))
        else:
            print(f"{prediction.path}: {text}" if len(paths) > 1 else text)
        if args.save:
            save_captioned(prediction, text, targets[number])
        if args.show:
            show_captioned(prediction, text)
    return code


if __name__ == "__main__":
    run(main, build_parser())
