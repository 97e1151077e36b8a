"""Several tensors at once, their results in order, within a bound on memory."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from surgery import resources

_T = TypeVar("_T")

# Calls begun and not yet taken, for each worker: enough to keep all busy while the oldest is a long one.
_AHEAD = 3


def count() -> int:
    """Worker threads of this process: the cores it may use, fewer where OMP_NUM_THREADS says so."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    granted = resources.cores()
    return min(granted, int(asked)) if asked.isdigit() and int(asked) > 0 else granted


def in_order(tasks: Iterable[tuple[int, Callable[[], _T]]], *, workers: int, budget: int) -> Generator[_T]:
    """Yield the results of calls that run on several threads, in the order of the calls.

    A call is begun when the bytes of all that are begun and not yet taken, its own included, fit into the budget
    (a few calls for each worker at most), or when there are no others. The first failure is raised in its turn; calls
    not yet begun are then dropped, as they are when the generator is closed. Calls that run are waited for.

    Args:
        tasks: The bytes each call needs until its result is taken, and the call.
        workers: Threads, at least 1.
        budget: Bytes.
    """
    held, begun = 0, deque[tuple[int, Future[_T]]]()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="edit")
    try:
        for cost, call in tasks:
            while begun and (held + cost > budget or len(begun) >= _AHEAD * workers):
                yield begun[0][1].result()
                held -= begun.popleft()[0]
            begun.append((cost, pool.submit(call)))
            held += cost
        while begun:
            yield begun[0][1].result()
            begun.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
