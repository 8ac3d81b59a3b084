"""Randomness by counting: every random choice of a run is a function of its seed and of where it is made.

Nothing has to be saved to resume exactly: the order of epoch 7, the augmentation of picture 12 in it and the dropout
of its batch 3 are the same numbers in whatever process they are drawn.
"""

from __future__ import annotations

import hashlib


def stream(seed: int, *place: str | int) -> int:
    """A 63-bit number that depends on the seed and on a named place, for seeding a generator."""
    text = "/".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
