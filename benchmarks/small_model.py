"""A whole small model (SmolLM2-135M's shapes) against the authors' computation: the edit stage, and the command."""

import sys
from pathlib import Path

from benchmarks.copying import fresh
from benchmarks.pairs import write_pair
from benchmarks.reference import timed_edit_stage
from benchmarks.timing import Measured, Row, alternated, lox, median, spread, timed
from surgery.checkpoint.reader import Reader
from surgery.editing import Editor
from surgery.edits import in_work_order
from surgery.job import Job, prepare
from surgery.methods.lox import LoX


def edit_all(job: Job) -> None:
    """Edit every tensor as a run does, its reading included, and drop the results."""
    with Reader(job.aligned) as aligned, Reader(job.base) as base:
        editor = Editor(job.method, job.options, aligned, base)
        for _ in in_work_order(job, job.aligned.shards, editor.edit):
            pass


def rows(folder: Path, repeats: int) -> list[Row]:
    """Ratios of the edit stage and of the whole command."""
    pair, out = write_pair(folder / "135M-spiked-0.01", "135M", "spiked", 1e-2), folder / "out"
    job = prepare(LoX(rank=6, alpha=1.5), base=pair[0], model=pair[1], output=out)
    edit_all(job)
    stage = {
        "ours": lambda: _single_threaded(job),
        "reference": lambda: Measured(timed_edit_stage(*pair)),
    }
    whole = {
        "ours": lambda: fresh(lox(pair, out), pair, out),
        "reference": lambda: fresh([sys.executable, "-m", "benchmarks.reference", *pair, out], pair, out),
    }
    return [
        _row("135M, spiked: reference / ours, edit stage", alternated(stage, repeats), 25),
        _row("135M, spiked: reference / ours, whole command", alternated(whole, repeats), 4),
    ]


def _single_threaded(job: Job) -> Measured:
    import torch

    torch.set_num_threads(1)
    return timed(lambda: edit_all(job))


def _row(name: str, taken: dict[str, list[Measured]], target: float) -> Row:
    ours, theirs = taken["ours"], taken["reference"]
    value = median(theirs) / median(ours)
    return Row(
        name, value, "x", f"at least {target:g}", value >= target, f"{spread(theirs)} against {spread(ours)}"
    )
