"""The shards of an edited model: tensors edited by several workers, written in order, hashed beside it."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

from surgery.checkpoint.header import TensorInfo, build_header
from surgery.checkpoint.layout import Shard
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.staging import Staging
from surgery.checkpoint.writer import ShardFile
from surgery.editing import AbstractEditor, Edited, Record, as_bytes, copied
from surgery.edits import Progress, in_work_order
from surgery.inputs import InputHashes
from surgery.job import Job
from surgery.plan import Step, output_size
from surgery.processes import shares, team
from surgery.streams import Inputs


def write_shards(job: Job, staging: Staging, hashes: InputHashes, progress: Progress | None) -> list[Record]:
    """Write every shard that the journal does not already hold; return the per-tensor records.

    Of several processes each writes its share; all return the records of all.
    """
    together = team()
    done = {
        entry["shard"]: entry
        for entry in staging.entries
        if "shard" in entry and (staging.path / entry["shard"]).is_file()
    }
    left = {shard.output_name: shard for shard in job.aligned.shards if shard.output_name not in done}
    share = shares(((name, _cost(job, shard)) for name, shard in left.items()), together.size)[together.rank]
    here = _Share(job, staging, hashes, [shard for name, shard in left.items() if name in share])
    mine = together.agree(lambda: here.write(progress))
    for written, taken in together.gather((mine, hashes.taken)):
        done |= written
        hashes.taken |= taken
    staging.entries = list(done.values())
    return [record for shard in job.aligned.shards for record in done[shard.output_name]["records"]]


def _cost(job: Job, shard: Shard) -> float:
    """What a shard takes to write, in the cost of copying one entry: an edit takes about five times as much."""
    steps = (job.plan.steps[info.name] for info in shard.header.tensors)
    return math.fsum(math.prod(step.shape) * (5.0 if step.action == "edit" else 1.0) for step in steps)


class _Share:
    """The shards that this process writes, and the inputs it hashes."""

    def __init__(self, job: Job, staging: Staging, hashes: InputHashes, shards: Sequence[Shard]) -> None:
        self._job, self._staging, self._hashes, self._shards = job, staging, hashes, shards
        sizes = (
            (f"{role}/{shard.name}", float(shard.header.size))
            for role, checkpoint in job.checkpoints.items()
            for shard in checkpoint.shards
            if role != job.edited
        )
        self._hashed_here = set(shares(sizes, team().size)[team().rank])

    def write(self, progress: Progress | None) -> dict[str, dict[str, Any]]:
        """Write the shards; their journal entries by name."""
        written: dict[str, dict[str, Any]] = {}
        job, done = self._job, len(self._job.aligned.shards) - len(self._shards)
        inputs = Inputs(job, self._staging.path / f".shards-{team().rank}", self._shards)
        editor = job.editor(inputs.aligned, inputs.base)
        self._hashes.measured = inputs.measured(self._hashes.measured)
        with inputs, closing(in_work_order(job, self._shards, editor.edit)) as edits, closing(inputs):
            for number, shard in enumerate(self._shards):
                for near in self._shards[number : number + 2]:
                    self._each_input(near, self._hashes.begin)
                entry = self._shard(shard, edits, editor, inputs.aligned)
                self._each_input(shard, self._hashes.take)
                self._staging.record(entry)
                inputs.done(shard)
                written[shard.output_name] = entry
                if progress is not None:
                    progress(shard.output_name, done + len(written), len(job.aligned.shards))
        return written

    def _each_input(self, shard: Shard, call: Callable[[str, Shard], object]) -> None:
        """Call for a shard that is edited, and for the other files its edits need which are hashed here."""
        for role, other in self._job.inputs_of(shard):
            if role == self._job.edited or f"{role}/{other.name}" in self._hashed_here:
                call(role, other)

    def _shard(
        self, shard: Shard, edits: Iterator[Edited], editor: AbstractEditor, aligned: Reader
    ) -> dict[str, Any]:
        """Write one shard and return its journal entry."""
        steps = [self._job.plan.steps[info.name] for info in shard.header.tensors]
        header = _output_header(shard, steps)
        size = len(header) + sum(output_size(step) for step in steps)
        records = []
        with ShardFile(self._staging.path / shard.output_name, header, size) as file:
            for info, step in zip(shard.header.tensors, steps, strict=True):
                edited = next(edits) if step.action == "edit" else None
                records.append(_write_tensor(file, info, step, edited, editor, aligned))
            written = file.close()
        return {"shard": shard.output_name, **dataclasses.asdict(written), "records": records}


def _write_tensor(
    file: ShardFile,
    info: TensorInfo,
    step: Step,
    edited: Edited | None,
    editor: AbstractEditor,
    aligned: Reader,
) -> Record:
    """Write a tensor, edited or from the aligned checkpoint, and return its record."""
    if edited is not None and edited.tensor is not None:
        file.write(as_bytes(edited.tensor))
        return edited.record
    editor.require_finite_base(step)
    for chunk in copied(aligned, info, step.dtype):
        file.write(chunk)
    return (
        edited.record if edited is not None else {"name": step.name, "action": "copy", "reason": step.reason}
    )


def _output_header(shard: Shard, steps: list[Step]) -> bytes:
    """The source's own header where it says the same, so that an edit of nothing is the same file."""
    header = shard.header
    same = all(info.dtype == step.dtype for info, step in zip(header.tensors, steps, strict=True))
    if shard.kind == "safetensors" and same and header.metadata.get("format") == "pt":
        return header.raw
    rows = [(step.name, step.dtype, step.shape, output_size(step)) for step in steps]
    return build_header(rows, {"format": "pt"})
