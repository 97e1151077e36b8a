"""Random bits as a function of a key and a counter (Philox4x32-10), in plain tensor operations.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A bit depends on its
counter alone, so it is the same whichever tile, thread or process asks for it, and in whatever order.
"""

import hashlib

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def key(seed: int, name: str) -> tuple[int, int]:
    """The two 32-bit words that stand for (`seed`, `name`): the first 8 bytes of a SHA-256, little-endian.

    Any integer serves as `seed`. Different tensors of one run get unrelated keys.
    """
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox4x32(counter: Int64[Tensor, "4 *shape"], words: tuple[int, int]) -> Int64[Tensor, "4 *shape"]:
    """Four random 32-bit words per counter, each held in an int64 from 0 to 2**32 - 1.

    `counter` holds four words of the same range, least significant first; `words` is the key.
    """
    a, b, c, d = counter.unbind(0)
    for step in range(_ROUNDS):
        # A product of two 32-bit words wraps in int64; its 64 bits are right all the same.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        low, high = ((word + step * weyl) & _LOW for word, weyl in zip(words, _WEYL, strict=True))
        a, c = _high(second).bitwise_xor_(b).bitwise_xor_(low), _high(first).bitwise_xor_(d).bitwise_xor_(high)
        b, d = second.bitwise_and_(_LOW), first.bitwise_and_(_LOW)
    return torch.stack((a, b, c, d))


def uniform(start: int, count: int, words: tuple[int, int]) -> Float64[Tensor, " {count}"]:
    """Numbers in [0, 1), multiples of 2**-53, for the counters `start` to `start + count - 1`.

    Counters are 64-bit (the two upper words of Philox's counter are zero).
    """
    index = torch.arange(start, start + count, dtype=torch.int64)
    counter = index.new_zeros(4, count)
    counter[0], counter[1] = index & _LOW, _high(index)
    bits = philox4x32(counter, words)
    return ((bits[0] << 21) | (bits[1] >> 11)).double() * 2.0**-53


def _high(product: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """The upper 32 of 64 bits; masked, because the shift drags the sign along."""
    return (product >> 32).bitwise_and_(_LOW)
