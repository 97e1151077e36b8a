"""One command of the study: run in the ground's folder, timed, its memory watched from outside."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.memory import MIB, anonymous
from benchmarks.timing import ENVIRONMENT

_INTERVAL = 0.05
# Exit codes of a command that was interrupted, by itself or by the signal.
_STOPPED = (130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)
# Of what a command says before it fails.
_TAIL = 400


class CommandFailedError(Exception):
    """A command of the study ended with another exit code than 0; the message has its last words."""


class StoppedError(Exception):
    """A command was interrupted: what it was to find is as unknown as before."""


@dataclass(frozen=True)
class Ran:
    """What a command took.

    Attributes:
        words: The command, as a reader would type it.
        wall: Seconds.
        peak: Anonymous memory in MiB.
    """

    words: str
    wall: float
    peak: float


def spelled(words: Sequence[str]) -> str:
    """A command as a reader would type it."""
    return shlex.join(words)


def run(words: Sequence[str], folder: Path, log: Path, *, threads: int | None = None) -> Ran:
    """Run a command that begins with `surgery` or `python` by this interpreter.

    Args:
        words: The command.
        folder: Where.
        log: Gets what it says.
        threads: Of its arithmetic; all cores by default.

    Raises:
        CommandFailedError: It failed.
        StoppedError: It was interrupted.
    """
    start = {"surgery": ["-m", "surgery"], "python": []}[words[0]]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": root, "TOKENIZERS_PARALLELISM": "false"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    begun = time.perf_counter()
    with log.open("a") as told:
        told.write(f"$ {spelled(words)}\n")
        told.flush()
        said_from = told.tell()
        process = subprocess.Popen(
            [sys.executable, *start, *words[1:]],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
        )
        peak = _watched(process)
    if process.returncode in _STOPPED:
        raise StoppedError(spelled(words[:2]))
    if process.returncode:
        said = log.read_text()[said_from:].strip()[-_TAIL:]
        raise CommandFailedError(f"{spelled(words[:2])} ended with {process.returncode}: {said}")
    return Ran(spelled(words), time.perf_counter() - begun, peak / MIB)


def _watched(process: subprocess.Popen[bytes]) -> int:
    """The largest anonymous memory of a process until it ends, bytes; the process is gone afterwards."""
    largest = 0
    try:
        while process.poll() is None:
            largest = max(largest, anonymous(process.pid))
            time.sleep(_INTERVAL)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return largest
