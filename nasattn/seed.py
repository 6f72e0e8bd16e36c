"""Seeds that follow from what they are for, so that no order of events can change them."""

import hashlib


def derive(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2**31) for this use of the study's seed: (study seed, slot) for a proposal,
    (study seed, architecture key, repeat) for a training."""
    text = ":".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
