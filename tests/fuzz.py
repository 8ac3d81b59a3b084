"""Send damaged pictures through the handler until something breaks: a program, and what test_fuzz.py runs small.

    python -m tests.fuzz --count 100000 --seed 1

Each picture is one of tests/pictures.py, damaged in one to four places: bits flipped, bytes cut, doubled, overwritten,
swapped with another picture's. It goes through TorchServe's Service in batches of eight, with an undamaged one among
them. Ends with exit code 1, the batch in files, if a status is not one of 200, 400, 413, 415 and 422, if the undamaged
one is not answered as it is alone, or if memory grows.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.conftest import save_untrained
from tests.pictures import bad_pictures, odd_pictures

ALLOWED = (200, 400, 413, 415, 422)
GROWTH_MB = 150
"""What memory may grow after the first tenth of the pictures: allocators keep some, a leak has no end."""


def damaged(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One picture of `seeds` with one to four damages."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        at = rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(min(64, len(data)))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 64)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 64)]
        elif kind == 3:
            data[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"))
        elif kind == 4:
            del data[at:]
        else:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[at:] = other[start:]
    return bytes(data)


def fuzz(count: int, seed: int, folder: Path) -> Iterator[tuple[int, Counter[int]]]:
    """Run `count` pictures; yields (how many so far, statuses so far) after each thousand.

    Raises:
        AssertionError: something broke; the guilty batch lies in `folder`.
    """
    from tests.test_handler import Server, lay_out

    weights = save_untrained(folder, "cat_dog_conv_net", 0)
    model = folder / "model"
    model.mkdir()
    card = lay_out(weights, model)
    sys.path.insert(0, str(model))
    server = Server(model, card.spec.arch, weights.name, {"handler": {"engine": "torch"}})
    seeds = [data for data in odd_pictures().values() if len(data) < 200_000]
    seeds += [data for _, data in bad_pictures().values() if len(data) < 200_000]
    whole = odd_pictures()["jpeg_rgb"]
    alone = server.ask(whole)[0]["body"]
    rng = random.Random(seed)
    told: Counter[int] = Counter()
    process = psutil.Process()
    settled_mb = 0.0
    for done in range(0, count, 7):
        batch = [damaged(rng, seeds) for _ in range(7)]
        batch.insert(rng.randrange(8), whole)
        replies = server.ask(*batch)
        told.update(reply["code"] for reply in replies)
        wrong = [reply["code"] for reply in replies if reply["code"] not in ALLOWED]
        answer = replies[batch.index(whole)]["body"]
        same = all(abs(answer.get(label, 9) - value) <= 1e-5 for label, value in alone.items())
        if wrong or not same:
            for number, data in enumerate(batch):
                (folder / f"guilty-{number}").write_bytes(data)
            raise AssertionError(f"statuses {wrong}, neighbour answered {answer}: the batch lies in {folder}")
        if done <= count // 10 < done + 7:
            settled_mb = process.memory_info().rss / 1e6
        if done // 1000 != (done + 7) // 1000:
            yield done + 7, told
    grown_mb = process.memory_info().rss / 1e6 - settled_mb
    assert grown_mb < GROWTH_MB, f"memory grew by {grown_mb:.0f} MB after the first tenth"
    yield count, told


def main() -> int:
    """Fuzz as the flags say; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from handlers import image_classifier

    image_classifier.check_own = lambda folder, *files: None  # the repository's own files, not an archive's
    folder = Path(tempfile.mkdtemp(prefix="marten-fuzz-"))
    begun = time.monotonic()
    told: Counter[int] = Counter()
    try:
        for done, told in fuzz(args.count, args.seed, folder):
            if done // 5000 != (done - 1000) // 5000:
                print(f"{done}: {dict(sorted(told.items()))}", flush=True)
    except AssertionError as error:
        print(f"broken: {error}", file=sys.stderr)
        return 1
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    seconds = time.monotonic() - begun
    print(f"{args.count} damaged pictures in {seconds:.0f} s, peak {peak_mb:.0f} MB: {dict(sorted(told.items()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
