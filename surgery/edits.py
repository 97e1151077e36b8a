"""The tensors of a run that are edited, several in work at once, in the order of the files."""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from surgery import memory, workers
from surgery.checkpoint.layout import Shard
from surgery.plan import Step

if TYPE_CHECKING:
    from surgery.job import Job

_T = TypeVar("_T")

Progress = Callable[[str, int, int], None]
"""Called after each shard with its name, how many are done, and how many there are."""


def in_work_order(job: "Job", shards: Sequence[Shard], work: Callable[[Step], _T]) -> Generator[_T]:
    """Yield what `work` makes of each step of these shards that is an edit, within the run's memory.

    Close it before the files that `work` reads: until then calls may be running.
    """
    steps = (job.plan.steps[info.name] for shard in shards for info in shard.header.tensors)
    return workers.in_order(
        (
            (memory.need(step, job.aligned, job.base), partial(work, step))
            for step in steps
            if step.action == "edit"
        ),
        workers=workers.count(),
        budget=memory.in_work(job.plan.steps, job.aligned, job.base, job.options.memory_limit),
    )
