"""Against copying: the whole command beside the work that nobody can avoid."""

import hashlib
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.pairs import SIZES, write_pair
from benchmarks.timing import Measured, Row, alternated, command, cores, lox, median, spread

ROOT = Path(__file__).parents[1]
_THIS = [sys.executable, "-m", "benchmarks.copying"]


def copy_hashed(source: Path, target: Path) -> None:
    """Copy and fsync a file, and take its SHA-256 on the way."""
    digest = hashlib.sha256()
    with open(source, "rb", buffering=0) as reading, open(target, "wb", buffering=0) as writing:
        while chunk := reading.read(1 << 22):
            digest.update(chunk)
            writing.write(chunk)
        os.fsync(writing.fileno())


def hashed(source: Path) -> None:
    """SHA-256 of a file."""
    with open(source, "rb", buffering=0) as reading:
        hashlib.file_digest(reading, "sha256")


def unavoidable(base: Path, aligned: Path, output: Path) -> None:
    """Copy the aligned checkpoint, fsync it, and hash both inputs and the output, on all cores."""
    output.mkdir()
    with ThreadPoolExecutor(cores()) as pool:
        begun = [
            pool.submit(copy_hashed, file, output / file.name)
            for file in sorted(aligned.glob("*.safetensors"))
        ]
        begun += [
            pool.submit(hashed, file)
            for side in (aligned, base)
            for file in sorted(side.glob("*.safetensors"))
        ]
        for one in begun:
            one.result()


def bare_copy(aligned: Path, output: Path) -> None:
    """Copy the aligned checkpoint and fsync it."""
    output.mkdir()
    for file in sorted(aligned.glob("*.safetensors")):
        shutil.copyfile(file, output / file.name)
        with open(output / file.name, "rb+") as copied:
            os.fsync(copied.fileno())


def copy(source: Path, target: Path) -> list[str | Path]:
    """The command line of `bare_copy`."""
    return [*_THIS, "bare_copy", source, target]


def rows(folder: Path, repeats: int, settings: tuple[tuple[str, float], ...]) -> list[Row]:
    """Wall time of `surgery lox` on the 1.1B pair over that of copying and hashing, and over that of copying."""
    return [row for kind, ratio in settings for row in _rows(folder, repeats, kind, ratio)]


def _rows(folder: Path, repeats: int, kind: str, ratio: float) -> list[Row]:
    pair = write_pair(folder / f"1.1B-{kind}-{ratio:g}", "1.1B", kind, ratio)
    out = folder / "out"
    taken = alternated(
        {
            "surgery": lambda: fresh(lox(pair, out), pair, out),
            "unavoidable": lambda: fresh([*_THIS, "unavoidable", *pair, out], pair, out),
            "copy": lambda: fresh(copy(pair[1], out), pair, out),
        },
        repeats,
    )
    ours, theirs, bare = (taken[name] for name in ("surgery", "unavoidable", "copy"))
    label, billions = f"1.1B, {kind}, edit/weight {ratio:g}", SIZES["1.1B"].parameters() / 1e9
    value, per = median(ours) / median(theirs), median(ours, "core") / billions
    least = median(theirs, "core") / billions
    return [
        Row(
            f"{label}: command / (copy + fsync + SHA-256)",
            value,
            "x",
            "at most 2.0, aim 1.3",
            value <= 2.0,
            f"{spread(ours)} against {spread(theirs)}",
        ),
        Row(f"{label}: command / (cp + fsync)", median(ours) / median(bare), "x", detail=spread(bare)),
        Row(
            f"{label}: core-seconds per 1e9 parameters",
            per,
            "s",
            "aim 20 or less",
            per <= 20,
            f"of which copying and hashing take {least:.1f} s alone",
        ),
    ]


def fresh(arguments: list[str | Path], pair: tuple[Path, Path], output: Path) -> Measured:
    """A command that writes `output`, with its inputs in the page cache; the output is removed again.

    Some machines give up cached pages that nobody reads for a while, so the inputs are read before every run.
    """
    for file in (file for side in pair for file in side.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as reading:
            while reading.read(1 << 24):
                pass
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    measured = command(arguments, ROOT)
    shutil.rmtree(output)
    os.sync()
    return measured


if __name__ == "__main__":
    {"unavoidable": unavoidable, "bare_copy": bare_copy}[sys.argv[1]](*map(Path, sys.argv[2:]))
