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
        # The upper halves of b and d are rubbish between rounds; what they are mixed into is masked.
        a = (second >> 32).bitwise_xor_(b).bitwise_xor_(low).bitwise_and_(_LOW)
        c = (first >> 32).bitwise_xor_(d).bitwise_xor_(high).bitwise_and_(_LOW)
        b, d = second, first
    return torch.stack((a, b & _LOW, c, d & _LOW))


def uniform(start: int, count: int, words: tuple[int, int]) -> Float64[Tensor, " {count}"]:
    """Numbers in [0, 1), multiples of 2**-32, for the indices `start` to `start + count - 1`.

    Index i is word i mod 4 of the 64-bit counter i // 4 (the two upper words of Philox's counter are zero).
    """
    first = start // 4
    index = torch.arange(first, (start + count + 3) // 4, dtype=torch.int64)
    counter = index.new_zeros(4, len(index))
    counter[0], counter[1] = index & _LOW, index >> 32
    bits = philox4x32(counter, words).T.reshape(-1)
    return bits[start - 4 * first :][:count].double().mul_(2.0**-32)
