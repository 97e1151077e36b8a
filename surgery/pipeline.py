"""The one entry point: from two checkpoints to a third, whole or not at all.

resolve -> headers -> plan -> `OUT.partial` -> shard by shard: read, edit, round, write -> check -> manifest and
card -> one rename. No model class is built and no code from a model folder runs.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery import finishing, provenance, resources
from surgery.adapter import write_adapter
from surgery.checkpoint.header import TensorInfo, build_header
from surgery.checkpoint.layout import Shard
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.staging import MANIFEST, Staging, partial_of, refuse_existing
from surgery.checkpoint.writer import ShardFile
from surgery.editing import Editor, Record, as_bytes, copied
from surgery.errors import InputError, ResourceError
from surgery.inputs import InputHashes
from surgery.job import Job, prepare
from surgery.methods.base import WeightEdit
from surgery.options import Options
from surgery.plan import Plan, Step, output_size

Progress = Callable[[str, int, int], None]


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
            **{key: self.totals[key] for key in keys},
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "bytes_written": self.bytes_written,
            "manifest": str(self.manifest),
        }


def _refuse_resources(job: Job) -> None:
    """Refuse a run that the disk or the memory cannot hold; what an interrupted run wrote is counted as there."""
    partial = partial_of(job.output)
    done = sum(file.stat().st_size for file in partial.iterdir() if file.is_file()) if partial.is_dir() else 0
    if job.plan.bytes_written - done > job.plan.disk_free:
        raise ResourceError(
            f"the output needs {_mebibytes(job.plan.bytes_written)} and {_mebibytes(job.plan.disk_free)} are free "
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
    """Carry out a planned run."""
    started = time.monotonic()
    refuse_existing(job.output, overwrite=job.options.overwrite)
    _refuse_resources(job)
    fingerprint = job.fingerprint()
    with Staging(job.output, fingerprint, overwrite=job.options.overwrite) as staging:
        write = write_adapter if job.options.as_lora else write_model
        hashes = input_hashes(job, staging)
        records = write(job, staging, hashes, progress)
        inputs = hashes.all()
        if job.fingerprint() != fingerprint:
            raise InputError("an input changed while it was read; run the command again")
        _require_edits(records, job)
        finishing.finish(job, staging, records, inputs, time.monotonic() - started)
        staging.commit()
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


def _require_edits(records: list[Record], job: Job) -> None:
    if not any(record["action"] == "edit" for record in records):
        raise InputError(
            f"alignment changed none of the selected tensors: {job.base.label} and {job.aligned.label} hold the same "
            "weights there; check that base is the checkpoint before alignment"
        )


def input_hashes(job: Job, staging: Staging) -> InputHashes:
    """Hashes of the inputs, those of an interrupted run among them."""
    known = dict(entry["input"] for entry in staging.entries if "input" in entry)
    checkpoints = {"base": job.base, "aligned": job.aligned}
    return InputHashes(checkpoints, known, lambda key, sha256: staging.record({"input": [key, sha256]}))


def write_model(job: Job, staging: Staging, hashes: InputHashes, progress: Progress | None) -> list[Record]:
    """Write every shard that the journal does not already hold; return the per-tensor records."""
    done = {entry["shard"]: entry for entry in staging.entries if "shard" in entry}
    records: list[Record] = []
    with Reader(job.aligned) as aligned, Reader(job.base) as base:
        editor = Editor(job.method, job.options, aligned, base)
        for number, shard in enumerate(job.aligned.shards, 1):
            entry = done.get(shard.output_name)
            if entry is None or not (staging.path / shard.output_name).is_file():
                _hash_inputs(job, shard, hashes)
                entry = _write_shard(job, shard, editor, aligned, staging.path)
                staging.record(entry)
                staging.entries.append(entry)
            records += entry["records"]
            if progress is not None:
                progress(shard.output_name, number, len(job.aligned.shards))
    return records


def _hash_inputs(job: Job, shard: Shard, hashes: InputHashes) -> None:
    """Hash a shard of the aligned checkpoint, and the shards of the base that its edits need."""
    hashes.take("aligned", shard)
    steps = (job.plan.steps[info.name] for info in shard.header.tensors)
    needed = {job.base.tensors[step.base].file for step in steps if step.action == "edit" and step.base}
    for other in job.base.shards:
        if other.name in needed:
            hashes.take("base", other)


def _write_shard(job: Job, shard: Shard, editor: Editor, aligned: Reader, folder: Path) -> dict[str, Any]:
    """Write one shard and return its journal entry."""
    steps = [job.plan.steps[info.name] for info in shard.header.tensors]
    header = _output_header(shard, steps)
    size = len(header) + sum(output_size(step) for step in steps)
    records = []
    with ShardFile(folder / shard.output_name, header, size) as file:
        for info, step in zip(shard.header.tensors, steps, strict=True):
            records.append(_write_tensor(file, info, step, editor, aligned))
        written = file.close()
    return {"shard": shard.output_name, "size": written.size, "sha256": written.sha256, "records": records}


def _write_tensor(file: ShardFile, info: TensorInfo, step: Step, editor: Editor, aligned: Reader) -> Record:
    record: Record = {"name": step.name, "action": "copy", "reason": step.reason}
    if step.action == "edit":
        edited = editor.edit(step)
        record = edited.record
        if edited.tensor is not None:
            file.write(as_bytes(edited.tensor))
            return record
    editor.require_finite_base(step)
    for chunk in copied(aligned, info, step.dtype):
        file.write(chunk)
    return record


def _output_header(shard: Shard, steps: list[Step]) -> bytes:
    """The source's own header where it says the same, so that an edit of nothing is the same file."""
    header = shard.header
    same = all(info.dtype == step.dtype for info, step in zip(header.tensors, steps, strict=True))
    if shard.kind == "safetensors" and same and header.metadata.get("format") == "pt":
        return header.raw
    rows = [(step.name, step.dtype, step.shape, output_size(step)) for step in steps]
    return build_header(rows, {"format": "pt"})
