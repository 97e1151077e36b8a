"""Anonymous memory of the command, read from outside every 10 ms."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pairs import write_pair
from benchmarks.timing import ENVIRONMENT, Row, lox

INTERVAL = 0.01
MIB = 1 << 20


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("RssAnon:")), 0)


def peak(arguments: Sequence[str | Path]) -> int:
    """Largest RssAnon of a command, bytes.

    Raises:
        RuntimeError: It failed.
    """
    process = subprocess.Popen(
        [str(one) for one in arguments],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    largest = 0
    while process.poll() is None:
        largest = max(largest, anonymous(process.pid))
        time.sleep(INTERVAL)
    if process.returncode:
        raise RuntimeError(process.communicate()[1].decode())
    return largest


def interpreter() -> int:
    """RssAnon of an interpreter that has imported torch, bytes."""
    return peak([sys.executable, "-c", "import torch, time; time.sleep(0.5)"])


def rows(folder: Path) -> list[Row]:
    """The 1.1B pair, the same with twice the layers, and a run held to a limit."""
    torch_alone = interpreter()
    found, peaks = [], {}
    for size in ("1.1B", "1.1B-twice"):
        pair = write_pair(folder / f"{size}-spiked-0.01", size, "spiked", 1e-2)
        peaks[size] = peak(lox(pair, folder / "out")) - torch_alone
        shutil.rmtree(folder / "out")
    single = peaks["1.1B"]
    found.append(
        Row(
            "1.1B: anonymous memory above an interpreter with torch",
            single / MIB,
            "MiB",
            "at most 1024",
            single <= 1024 * MIB,
            f"the interpreter itself has {torch_alone / MIB:.0f} MiB",
        )
    )
    ratio = peaks["1.1B-twice"] / single
    found.append(
        Row(
            "1.1B with twice the layers / 1.1B: anonymous memory",
            ratio,
            "x",
            "within 5 % of 1",
            abs(ratio - 1) <= 0.05,
            f"{peaks['1.1B-twice'] / MIB:.0f} MiB against {single / MIB:.0f} MiB",
        )
    )
    limit = 1200 * MIB
    pair = write_pair(folder / "1.1B-spiked-0.01", "1.1B", "spiked", 1e-2)
    held = peak(lox(pair, folder / "out", "--memory-limit", f"{limit // MIB}MiB"))
    shutil.rmtree(folder / "out")
    found.append(
        Row(
            "1.1B with --memory-limit 1200MiB: anonymous memory",
            held / MIB,
            "MiB",
            "below 1200",
            held < limit,
        )
    )
    return found
