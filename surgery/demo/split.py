"""Which combination goes into which part: by hash, so that it depends on nothing but the seed."""

import hashlib
from collections.abc import Iterable, Sequence


def rank_of(seed: int, *words: str) -> float:
    """A number in [0, 1) that depends only on `seed` and `words`, the same on every machine and version."""
    text = "\x1f".join([str(seed), *words])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def deal(seed: int, thing: str, requests: Iterable[str], apart: Sequence[str]) -> dict[str, str]:
    """The part of each of the `requests` that can be made about `thing`.

    One request, drawn by hash, goes to each part named in `apart`; the others go to `train`, so that every
    thing is met in training.
    """
    drawn = sorted(requests, key=lambda request: rank_of(seed, "part", thing, request))
    return dict(zip(drawn, [*apart, *["train"] * (len(drawn) - len(apart))], strict=True))
