"""Two or more ways of doing a thing, alternated in one run; medians."""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1", "CI": "1"}
"""Set for every timed process, on both sides."""


@dataclass(frozen=True)
class Measured:
    """Seconds of wall time, and of processor time over all cores (0 where it was not measured)."""

    wall: float
    core: float = 0.0


@dataclass(frozen=True)
class Row:
    """One figure of the table.

    Attributes:
        name: What is compared.
        value: The figure.
        unit: "x" for ratios, or a unit.
        target: What it should be, in words; empty where it is only reported.
        met: Whether it is; None without a target.
        detail: The two things behind a ratio, and how they spread.
    """

    name: str
    value: float
    unit: str
    target: str = ""
    met: bool | None = None
    detail: str = ""

    def document(self) -> dict[str, object]:
        """The row as it stands in a results file."""
        return asdict(self)


def cores() -> int:
    """Cores that both sides may use."""
    return len(os.sched_getaffinity(0))


def alternated(ways: Mapping[str, Callable[[], Measured]], repeats: int) -> dict[str, list[Measured]]:
    """Each way `repeats` times, one after the other in turns, so that what else the machine does hits all alike."""
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(way())
    return found


def median(measured: Sequence[Measured], figure: str = "wall") -> float:
    """The median of one figure."""
    return statistics.median(getattr(one, figure) for one in measured)


def spread(measured: Sequence[Measured]) -> str:
    """Median and range of the wall time, in words."""
    walls = [one.wall for one in measured]
    return f"{statistics.median(walls):.3g} s ({min(walls):.3g} to {max(walls):.3g}, n {len(walls)})"


def timed(call: Callable[[], object]) -> Measured:
    """A call in this process."""
    wall, core = time.perf_counter(), time.process_time()
    call()
    return Measured(time.perf_counter() - wall, time.process_time() - core)


def command(arguments: Sequence[str | Path], folder: Path) -> Measured:
    """A command in a process of its own, its children included, run in a folder.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [str(one) for one in arguments],
        check=True,
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wall = time.perf_counter() - wall
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    core = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return Measured(wall, core)


def surgery(*arguments: str | Path) -> list[str | Path]:
    """The command line of `surgery` as this interpreter would run it."""
    return [sys.executable, "-m", "surgery", *arguments]


def lox(pair: tuple[Path, Path], output: Path, *options: str) -> list[str | Path]:
    """The main job on a pair of folders, at the user's own example's settings."""
    return surgery("lox", *pair, "--rank", "6", "--alpha", "1.5", "--output", output, "--quiet", *options)
