"""How the C library hands memory back: at once, for what streams tensors; late, for what computes with a model.

Both hold for the whole process, so a program's own entry point decides whether this module does anything at all:
until it calls `return_freed`, `freed_kept` leaves everything as it is.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LARGE = 1 << 20
"""Bytes from which a tensor gets a mapping of its own."""

KEPT = 1 << 26
"""The same inside `freed_kept`; twice as many bytes stay with the process for what comes next."""

# Of glibc's malloc.h, and what the first of them is where nobody says otherwise.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_USUAL_TRIM = 128 << 10

_returning = False


def return_freed() -> bool:
    """From here on, memory of `LARGE` bytes and more goes back to the system the moment it is freed.

    glibc by itself raises the size from which it does so to that of the largest tensor freed, up to 32 MiB; tensors
    below it then share a heap whose holes nothing fits, and the memory of a process that reads one tensor after the
    other grows with their number: by 150 MiB over 100 layers of 4 MiB, where nothing is held.

    Returns:
        Whether it holds: not with another C library, nor where MALLOC_MMAP_THRESHOLD_ already says what is wanted.
    """
    global _returning
    library = ctypes.CDLL(None)
    wanted = "MALLOC_MMAP_THRESHOLD_" not in os.environ and hasattr(library, "mallopt")
    _returning = wanted and library.mallopt(_M_MMAP_THRESHOLD, LARGE) == 1
    return _returning


@contextmanager
def freed_kept() -> Iterator[None]:
    """A block that computes with a model: what it frees stays for its next tensors, and goes back at its end.

    The tensors of one step are those of the next. Handed back in between, each costs a call of the system and its
    pages being cleared once more: an eighth of the time of an adapter's attack on SmolLM2-135M, a sixth where all
    weights are trained. Kept, they leave holes: the largest memory rises by one and four per cent there, and by a
    fifth where all weights of a model of 30 million are trained. A block within another ends with that.
    """
    global _returning
    if not _returning:
        yield
        return
    library, _returning = ctypes.CDLL(None), False
    _set(library, KEPT, 2 * KEPT)
    try:
        yield
    finally:
        _returning = True
        _set(library, LARGE, _USUAL_TRIM)
        library.malloc_trim(0)


def _set(library: Any, mapped: int, kept: int) -> None:
    """From how many bytes a tensor gets a mapping of its own, and how many free ones stay at the end of the heap."""
    library.mallopt(_M_MMAP_THRESHOLD, mapped)
    library.mallopt(_M_TRIM_THRESHOLD, kept)
