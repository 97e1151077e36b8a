"""Several processes at one run, started by `accelerate launch` (or torchrun), on one machine or many.

The processes share nothing but the output's folder; what they tell each other (who is done with what) is small
and goes over gloo, also where the work runs on GPUs.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

from surgery.errors import Interrupted, ResourceError, SurgeryError, UsageError

_T = TypeVar("_T")

# What every launcher of PyTorch programs sets.
_SIZE, _RANK, _LOCAL_RANK = "WORLD_SIZE", "RANK", "LOCAL_RANK"
# How long a process waits for others that still work; one that died is noticed at once.
_PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class Team:
    """The processes of a run as one of them sees them.

    Attributes:
        rank: This process, from 0.
        size: How many there are.
        local_rank: This process among those on its machine: the GPU it takes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that plans the folder, checks the result and speaks to the user."""
        return self.rank == 0

    def gather(self, value: _T) -> list[_T]:
        """The values of all processes, by rank; every process must call this at the same place.

        Raises:
            ResourceError: Another process died.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=_group())
        except RuntimeError as error:
            raise ResourceError(
                "another process of this run ended before its work was done; run the same command again: what is "
                f"finished is kept ({str(error).splitlines()[0]})"
            ) from error
        return values

    def agree(self, call: Callable[[], _T]) -> _T:
        """The result of a call that every process makes at the same place, once all have made theirs.

        Raises:
            Exception: What it raised here, or in the first process in which it failed. An interruption is not passed
                on: the process ends, which the others notice.
        """
        value, error = None, None
        try:
            value = call()
        except Interrupted:
            raise
        except (SurgeryError, OSError, MemoryError, RuntimeError) as failure:
            error = failure
        errors = [one for one in self.gather(error) if one is not None]
        if error is not None or errors:
            raise error or errors[0]
        return cast(_T, value)


@functools.cache
def team() -> Team:
    """The processes of this run; joined at the first call.

    Raises:
        UsageError: The environment is not that of a launcher, or the others cannot be reached.
    """
    if os.environ.get(_SIZE, "1") == "1":
        return Team()
    import torch.distributed as dist

    try:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        return Team(dist.get_rank(), dist.get_world_size(), int(os.environ.get(_LOCAL_RANK, "0")))
    except (ValueError, RuntimeError) as error:
        what = str(error).splitlines()[0]
        raise UsageError(
            f"{_SIZE} is {os.environ[_SIZE]!r}, but the processes could not be joined ({what}); "
            f"start them by `accelerate launch`, or unset {_SIZE} to run alone"
        ) from error


def speaks() -> bool:
    """Whether this process prints results and errors: the first of a run. Known without joining the others."""
    return os.environ.get(_RANK, "0") == "0" or os.environ.get(_SIZE, "1") == "1"


@functools.cache
def _group() -> Any:
    """A gloo group of all processes: objects cannot be sent over NCCL without a GPU each."""
    import torch.distributed as dist

    return (
        dist.group.WORLD
        if dist.get_backend() == "gloo"
        else dist.new_group(backend="gloo", timeout=_PATIENCE)
    )


def leave() -> None:
    """Leave the group, if this process is in one; the last thing a process does."""
    if team.cache_info().currsize and team().size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()
    team.cache_clear()
    _group.cache_clear()


def shares(costs: Iterable[tuple[str, float]], size: int) -> Sequence[list[str]]:
    """Names spread over `size` processes so that none has much more to do than another.

    The largest first, each to whoever has least so far (Graham 1969: at most a third over the best possible); the
    same on every process.
    """
    loads = [0.0] * size
    names: list[list[str]] = [[] for _ in range(size)]
    for name, cost in sorted(costs, key=lambda one: (-one[1], one[0])):
        least = loads.index(min(loads))
        loads[least] += cost
        names[least].append(name)
    return names
