"""The method of the HTCondor example's infer.py, told again, to be measured against: a program, run alone.

    python -m marten.bench.original_infer WEIGHTS PICTURES OUTPUT

One process lists a folder, decodes every picture whole, resizes it, makes it a tensor and normalises it, one after the
other, in a DataLoader without workers and in batches of 100; torch keeps its own number of threads; a softmax; a .csv
at the end. The network and its weights are those that scripts/infer is given, so that the method alone differs.

Source: the CHTC machine-learning workflow template (S0-05, S0-08, S0-10, S0-19).
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from marten.weights import load_model


class _TestImages(Dataset[Any]):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = os.listdir(folder)
        self.transform = transforms.Compose(
            [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        name = self.names[index]
        return self.transform(Image.open(self.folder / name).convert("RGB")), name.split(".")[0]


def _main(weights: Path, folder: Path, output: Path) -> None:
    network, _ = load_model(weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device)
    begun, cpu_begun = time.perf_counter(), time.process_time()
    loader = DataLoader(_TestImages(folder), batch_size=100)
    rows: list[tuple[str, float]] = []
    with torch.no_grad():
        for images_NCHW, ids in loader:
            probs_NK = torch.nn.functional.softmax(network(images_NCHW.to(device)), dim=1)
            rows += zip(ids, probs_NK[:, 1].tolist(), strict=True)
    with open(output, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("fileid", "prob"), *rows])
    seconds = time.perf_counter() - begun
    cpu_ms = 1000 * (time.process_time() - cpu_begun) / len(rows)
    print(json.dumps({"images_s": len(rows) / seconds, "cpu_ms": cpu_ms}))


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:4]))
