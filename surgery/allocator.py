"""How the C library hands memory back, for processes that make and drop many large tensors."""

import ctypes
import os

LARGE = 1 << 20
"""Bytes from which a tensor gets a mapping of its own."""

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def return_freed() -> bool:
    """From here on, memory of `LARGE` bytes and more goes back to the system the moment it is freed.

    glibc by itself raises the size from which it does so to that of the largest tensor freed, up to 32 MiB; tensors
    below it then share a heap whose holes nothing fits, and the memory of a process that reads one tensor after the
    other grows with their number: by 150 MiB over 100 layers of 4 MiB, where nothing is held. It holds for the whole
    process, so a program's own entry point decides it, not a library call.

    Returns:
        Whether it holds: not with another C library, nor where MALLOC_MMAP_THRESHOLD_ already says what is wanted.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    return change is not None and change(_M_MMAP_THRESHOLD, LARGE) == 1
