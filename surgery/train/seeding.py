"""Seeds for everything random: each thing that is drawn has its own, so that none depends on what else was drawn."""

import hashlib


def seeded(*parts: int | str) -> int:
    """A seed from 0 to 2^63 - 1 that differs wherever one of the parts does."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
