"""The shards of an edited model: tensors edited by several workers, written in order, hashed beside it."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from surgery.checkpoint.header import TensorInfo, build_header
from surgery.checkpoint.layout import Shard
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.staging import Staging
from surgery.checkpoint.writer import ShardFile
from surgery.edits import in_work_order
from surgery.editing import Edited, Editor, Record, as_bytes, copied
from surgery.inputs import InputHashes
from surgery.job import Job
from surgery.plan import Step, output_size

Progress = Callable[[str, int, int], None]


def write_shards(
    job: Job, staging: Staging, hashes: InputHashes, progress: Progress | None
) -> list[Record]:
    """Write every shard that the journal does not already hold; return the per-tensor records."""
    done = {
        entry["shard"]: entry
        for entry in staging.entries
        if "shard" in entry and (staging.path / entry["shard"]).is_file()
    }
    shards = job.aligned.shards
    left = [shard for shard in shards if shard.output_name not in done]
    with Reader(job.aligned) as aligned, Reader(job.base) as base:
        editor = Editor(job.method, job.options, aligned, base)
        with closing(in_work_order(job, left, editor.edit)) as edits:
            for number, shard in enumerate(left):
                for near in left[number : number + 2]:
                    _begin_hashes(job, near, hashes)
                entry = _write_shard(job, shard, edits, editor, aligned, staging.path)
                _take_hashes(job, shard, hashes)
                staging.record(entry)
                staging.entries.append(entry)
                done[shard.output_name] = entry
                if progress is not None:
                    progress(shard.output_name, len(done), len(shards))
    return [record for shard in shards for record in done[shard.output_name]["records"]]


def _inputs(job: Job, shard: Shard) -> list[tuple[str, Shard]]:
    """A shard of the aligned checkpoint, and the shards of the base that its edits need, by role."""
    steps = (job.plan.steps[info.name] for info in shard.header.tensors)
    needed = {job.base.tensors[step.base].file for step in steps if step.action == "edit" and step.base}
    return [("aligned", shard), *(("base", other) for other in job.base.shards if other.name in needed)]


def _begin_hashes(job: Job, shard: Shard, hashes: InputHashes) -> None:
    for role, one in _inputs(job, shard):
        hashes.begin(role, one)


def _take_hashes(job: Job, shard: Shard, hashes: InputHashes) -> None:
    for role, one in _inputs(job, shard):
        hashes.take(role, one)


def _write_shard(
    job: Job, shard: Shard, edits: Iterator[Edited], editor: Editor, aligned: Reader, folder: Path
) -> dict[str, Any]:
    """Write one shard and return its journal entry."""
    steps = [job.plan.steps[info.name] for info in shard.header.tensors]
    header = _output_header(shard, steps)
    size = len(header) + sum(output_size(step) for step in steps)
    records = []
    with ShardFile(folder / shard.output_name, header, size) as file:
        for info, step in zip(shard.header.tensors, steps, strict=True):
            edited = next(edits) if step.action == "edit" else None
            records.append(_write_tensor(file, info, step, edited, editor, aligned))
        written = file.close()
    return {"shard": shard.output_name, **dataclasses.asdict(written), "records": records}


def _write_tensor(
    file: ShardFile, info: TensorInfo, step: Step, edited: Edited | None, editor: Editor, aligned: Reader
) -> Record:
    """Write a tensor, edited or from the aligned checkpoint, and return its record."""
    if edited is not None and edited.tensor is not None:
        file.write(as_bytes(edited.tensor))
        return edited.record
    editor.require_finite_base(step)
    for chunk in copied(aligned, info, step.dtype):
        file.write(chunk)
    return edited.record if edited is not None else {"name": step.name, "action": "copy", "reason": step.reason}


def _output_header(shard: Shard, steps: list[Step]) -> bytes:
    """The source's own header where it says the same, so that an edit of nothing is the same file."""
    header = shard.header
    same = all(info.dtype == step.dtype for info, step in zip(header.tensors, steps, strict=True))
    if shard.kind == "safetensors" and same and header.metadata.get("format") == "pt":
        return header.raw
    rows = [(step.name, step.dtype, step.shape, output_size(step)) for step in steps]
    return build_header(rows, {"format": "pt"})
