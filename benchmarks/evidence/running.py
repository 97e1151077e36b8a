"""One command of the study: run in the ground's folder, timed, its memory watched from outside.

Commands are forked from one process that has imported what most of them need: the imports take each of them seconds,
and many have little more to do. So times are told without them, and memory with those of all.
"""

import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from benchmarks.memory import MIB, anonymous
from benchmarks.timing import ENVIRONMENT, cores

IMPORTED = (
    "benchmarks.evidence.warm", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg",
    "matplotlib.figure", "optuna.storages",
    "peft", "pydantic", "sqlalchemy.dialects.sqlite", "sqlalchemy.orm", "torch", "transformers.generation.utils",
    "transformers.models.llama.modeling_llama", "surgery.attacking.page", "surgery.attacking.report",
    "surgery.cli.app", "surgery.cli.commands", "surgery.cli.edit", "surgery.evaluate.report",
    "surgery.sweeping.report", "surgery.train.running",
)  # fmt: skip
"""Modules that commands are forked with."""

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


_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload([*IMPORTED])
# Starting a process polls all others of this one, and two polls of one that ended take its exit code from each other.
_ONE_AT_A_TIME = threading.Lock()


def _started(*arguments: object) -> ForkServerProcess:
    """A forked process; what forks it ends with this process.

    Raises:
        StoppedError: What forks was interrupted.
    """
    process = _FORKING.Process(target=_carry_out, args=arguments)
    with _ONE_AT_A_TIME:
        with _environment():
            forkserver.ensure_running()
        try:
            process.start()
        except (EOFError, ConnectionError) as error:
            raise StoppedError("the start of a command") from error
    return process


@contextmanager
def _environment() -> Iterator[None]:
    """A block in which new processes get what is set for every timed one, and are told where this package lies."""
    before = dict(os.environ)
    paths = [str(Path(__file__).parents[2]), *filter(None, [before.get("PYTHONPATH")])]
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join(paths), TOKENIZERS_PARALLELISM="false")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(words: Sequence[str], folder: Path, log: Path, *, threads: int | None = None) -> Ran:
    """Run a command, `surgery ...` or `python -m MODULE ...`, by this interpreter.

    Args:
        words: The command.
        folder: Where.
        log: Gets what it says.
        threads: Of its arithmetic; all cores by default.

    Raises:
        CommandFailedError: It failed.
        StoppedError: It was interrupted.
    """
    with log.open("a") as told:
        told.write(f"$ {spelled(words)}\n")
        said_from = told.tell()
    process = _started(words, folder.resolve(), log.resolve(), threads or cores())
    begun = time.perf_counter()
    peak = _watched(process)
    if process.exitcode in _STOPPED:
        raise StoppedError(spelled(words[:2]))
    if process.exitcode:
        said = log.read_bytes()[said_from:].decode(errors="replace").strip()[-_TAIL:]
        raise CommandFailedError(f"{spelled(words[:2])} ended with {process.exitcode}: {said}")
    return Ran(spelled(words), time.perf_counter() - begun, peak / MIB)


def _carry_out(words: Sequence[str], folder: Path, log: Path, threads: int) -> None:
    """In the forked process: be the command."""
    import torch

    # As a process of its own would be ended; Python's own handler would make a failure of it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.chdir(folder)
    with log.open("a") as told:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(told.fileno(), stream.fileno())
    torch.set_num_threads(threads)
    module, options = ("surgery", words[1:]) if words[0] == "surgery" else (words[2], words[3:])
    sys.argv = [words[0], *options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _watched(process: ForkServerProcess) -> int:
    """The largest anonymous memory of a process until it ends, bytes; the process is gone afterwards."""
    largest = 0
    try:
        ended = False
        while not ended:
            largest = max(largest, anonymous(process.pid or 0))
            ended = bool(connection.wait([process.sentinel], _INTERVAL))
    except BaseException:
        process.kill()
        raise
    finally:
        with _ONE_AT_A_TIME:
            process.join()
    return largest
