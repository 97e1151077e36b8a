"""Where the processor time of a run goes: a profile of the stages, each thread's own time, nothing counted twice."""

import functools
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.pairs import SIZES, write_pair
from benchmarks.timing import Row
from surgery import editing, finishing, inputs, pipeline
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.writer import Digests, ShardFile
from surgery.job import prepare
from surgery.kernels import block_krylov, certified_svd
from surgery.kernels.store import Pass
from surgery.methods import lox
from surgery.methods.lox import LoX

SETTINGS = (("1.1B", "spiked", 1e-2), ("1.1B", "bulk", 1e-3), ("135M", "spiked", 1e-2))

STAGES: tuple[tuple[str, tuple[tuple[Any, str], ...]], ...] = (
    ("SHA-256 and checksums", ((inputs, "file_sha256"), (finishing, "file_checksum"), (Digests, "update"))),
    ("reading", ((Reader, "_fill"),)),
    ("finite? equal?", ((editing, "require_finite"), (editing, "_equal"))),
    ("difference", ((lox, "_difference"),)),
    ("products", tuple((block_krylov.Stored, name) for name in ("times", "transposed_times", "both"))),
    ("orthonormalising", ((block_krylov, "orthonormalise"),)),
    (
        "small problems and bounds",
        (
            *((block_krylov.Krylov, name) for name in ("ritz", "triplets")),
            *((certified_svd, name) for name in ("_promises", "_judge")),
        ),
    ),
    ("rest of the decomposition", ((lox.LoX, "update"),)),
    ("rounding: search", ((Pass, "look"),)),
    ("rounding: store", ((Pass, "write"),)),
    ("rounding: norm of the noise", ((Pass, "start"), (Pass, "largest"))),
    ("writing", ((ShardFile, "write"), (ShardFile, "close"))),
)


class Clock:
    """Seconds of processor time by stage, over all threads; time in a stage begun within another is its own."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._local, self._lock = threading.local(), threading.Lock()

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted."""

        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            outer: list[float] = self._local.__dict__.setdefault("inner", [])
            outer.append(0.0)
            begun = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                taken = time.thread_time() - begun
                inner = outer.pop()
                if outer:
                    outer[-1] += taken
                with self._lock:
                    self.seconds[stage] += taken - inner

        return counted


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Count the stages while the block runs."""
    places = [(owner, name, stage) for stage, named in STAGES for owner, name in named]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for (owner, name, function), (_, _, stage) in zip(kept, places, strict=True):
        setattr(owner, name, clock.around(stage, function))
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def rows(folder: Path) -> list[Row]:
    """Processor time of a run by stage, in nanoseconds for a parameter; the interpreter's start is not in it."""
    return [_row(folder, *setting) for setting in SETTINGS]


def _row(folder: Path, size: str, kind: str, ratio: float) -> Row:
    base, aligned = write_pair(folder / f"{size}-{kind}-{ratio:g}", size, kind, ratio)
    output, clock = folder / "out", Clock()
    job = prepare(LoX(rank=6, alpha=1.5), base=base, model=aligned, output=output)
    begun, cores = time.perf_counter(), time.process_time()
    with watched(clock):
        pipeline.run(job)
    wall, total = time.perf_counter() - begun, time.process_time() - cores
    shutil.rmtree(output)
    per = {stage: seconds / SIZES[size].parameters() * 1e9 for stage, seconds in clock.seconds.items()}
    rest = total / SIZES[size].parameters() * 1e9 - sum(per.values())
    told = ", ".join(
        f"{stage} {value:.1f}"
        for stage, value in sorted(per.items(), key=lambda one: -one[1])
        if value >= 0.05
    )
    return Row(
        f"{size}, {kind}, edit/weight {ratio:g}: processor time for a parameter",
        sum(per.values()) + rest,
        "ns",
        detail=f"{told}, all else {rest:.1f}; {total:.1f} s of processor time in {wall:.1f} s",
    )
