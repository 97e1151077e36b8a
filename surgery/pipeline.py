"""The one entry point: from two checkpoints to a third, whole or not at all.

resolve -> headers -> plan -> `OUT.partial` -> shard by shard: read, edit, round, write -> check -> manifest and
card -> one rename. No model class is built and no code from a model folder runs.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery import finishing, provenance, resources
from surgery.adapter import write_adapter
from surgery.checkpoint.staging import MANIFEST, Staging, partial_of, refuse_existing
from surgery.editing import Record
from surgery.edits import Progress
from surgery.errors import InputError, ResourceError, UsageError
from surgery.hub import fetch
from surgery.hub.remote import disk_need
from surgery.inputs import InputHashes
from surgery.job import Job, PairJob, prepare
from surgery.methods.base import WeightEdit
from surgery.options import Options
from surgery.plan import Plan
from surgery.processes import team
from surgery.shards import write_shards


@dataclass(frozen=True)
class Outcome:
    """What a run wrote and how well.

    Attributes:
        output: The folder.
        plan: What was planned.
        totals: Figures over all tensors; see `surgery.provenance.totals`.
        seconds: Wall time of the run.
        peak_rss_bytes: Largest resident memory of the process.
        bytes_written: Size of everything in the folder.
        manifest: The path of `surgery.json`.
        records: Per-tensor figures, in the order of the files.
    """

    output: Path
    plan: Plan
    totals: Mapping[str, Any]
    seconds: float
    peak_rss_bytes: int
    bytes_written: int
    manifest: Path
    records: tuple[Record, ...]

    def document(self) -> dict[str, Any]:
        """The run as `--json` prints it."""
        keys = (
            "edited",
            "copied",
            "unchanged",
            "energy_kept",
            "retention",
            "noise_to_edit",
            "certified_error_max",
        )
        return {
            "output": str(self.output),
            "equation": self.plan.equation,
            **{key: self.totals[key] for key in keys if key in self.totals},
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "bytes_written": self.bytes_written,
            "manifest": str(self.manifest),
        }


def _refuse_resources(job: Job) -> None:
    """Refuse a run that the disk or the memory cannot hold; what an interrupted run wrote is counted as there."""
    partial = partial_of(job.output)
    done = sum(file.stat().st_size for file in partial.iterdir() if file.is_file()) if partial.is_dir() else 0
    streamed = disk_need(job.aligned.shards) * team().size if job.options.stream else 0
    if (need := job.plan.bytes_written + streamed) - done > job.plan.disk_free:
        raise ResourceError(
            f"the output needs {_mebibytes(need)} and {_mebibytes(job.plan.disk_free)} are free "
            f"where {job.output} goes; free some space or choose another --output"
        )
    if job.plan.memory_bytes > (available := resources.memory_available()):
        raise ResourceError(
            f"the run needs about {_mebibytes(job.plan.memory_bytes)} of memory and {_mebibytes(available)} are "
            "available; leave out the largest tensors (--edit linear, --exclude) or use a larger machine"
        )


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def apply(
    method: WeightEdit,
    *,
    base: str | Path,
    model: str | Path,
    output: str | Path | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
    progress: Progress | None = None,
) -> Outcome:
    """Carry out a method on a pair of checkpoints and return what was written.

    `surgery.apply(LoX(rank=6, alpha=1.5), base="base", model="aligned")` is
    `surgery lox base aligned --rank 6 --alpha 1.5`.

    Args:
        method: What to do.
        base: The checkpoint before alignment: a folder, `ORG/NAME[@REVISION]`, `demo:base`.
        model: The aligned checkpoint.
        output: The folder to write; by default `./<aligned>-<method>`.
        options: How to run.
        progress: Called after each shard with its name, how many are done, and how many there are.

    Raises:
        SurgeryError: The run failed; `output` does not exist, or is what it was before.
    """
    job = prepare(method, base=base, model=model, output=output, options=options)
    return run(job, progress)


def run(job: Job, progress: Progress | None = None) -> Outcome:
    """Carry out a planned run; started by `accelerate launch`, all processes do so together."""
    started = time.monotonic()
    if not job.options.stream:
        for source in job.sources.values():
            fetch(source)
    if team().size > 1 and job.options.as_lora:
        raise UsageError("an adapter is written by one process; start it without a launcher")
    with ExitStack() as stack:
        records = _carry_out(job, stack, progress, started)
    return Outcome(
        output=job.output,
        plan=job.plan,
        totals=provenance.totals(records),
        seconds=time.monotonic() - started,
        peak_rss_bytes=resources.peak_rss(),
        bytes_written=sum(file.stat().st_size for file in job.output.rglob("*") if file.is_file()),
        manifest=job.output / MANIFEST,
        records=tuple(records),
    )


def _carry_out(job: Job, stack: ExitStack, progress: Progress | None, started: float) -> list[Record]:
    """The run in steps that all processes take together; the first holds the folder on `stack`."""
    together, fingerprint = team(), job.fingerprint()
    opened = together.agree(lambda: _open(job, stack, fingerprint) if together.leads else None)
    staging = together.agree(lambda: opened or Staging.join(job.output, fingerprint, together.rank))
    staging.entries = together.gather(staging.entries)[0]
    hashes = stack.enter_context(_input_hashes(job, staging))
    if isinstance(job, PairJob) and job.options.as_lora:
        records = write_adapter(job, staging, hashes, progress)
    else:
        records = write_shards(job, staging, hashes, progress)
    together.agree(
        lambda: _finish(job, staging, records, hashes, fingerprint, started) if together.leads else None
    )
    return records


def _open(job: Job, stack: ExitStack, fingerprint: Mapping[str, Any]) -> Staging:
    """The folder in which the output is built, opened and held."""
    refuse_existing(job.output, overwrite=job.options.overwrite)
    _refuse_resources(job)
    return stack.enter_context(Staging(job.output, fingerprint, overwrite=job.options.overwrite))


def _finish(
    job: Job,
    staging: Staging,
    records: list[Record],
    hashes: InputHashes,
    fingerprint: Mapping[str, Any],
    started: float,
) -> None:
    """Complete, check and commit the folder."""
    inputs = hashes.all()
    if job.fingerprint() != fingerprint:
        raise InputError("an input changed while it was read; run the command again")
    _require_edits(records, job)
    finishing.finish(job, staging, records, inputs, time.monotonic() - started)
    staging.commit()


def _require_edits(records: list[Record], job: Job) -> None:
    if not any(record["action"] == "edit" for record in records):
        raise InputError(job.nothing_changed())


def _input_hashes(job: Job, staging: Staging) -> InputHashes:
    """Hashes of the inputs, those of an interrupted run among them."""
    known = dict(entry["input"] for entry in staging.entries if "input" in entry)
    return InputHashes(job.checkpoints, known, lambda key, sha256: staging.record({"input": [key, sha256]}))
