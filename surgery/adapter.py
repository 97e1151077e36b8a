"""`--as-lora`: the edit as a PEFT adapter on its anchor, in full precision.

An extrapolation of rank k *is* a low-rank adapter: factors in float32, alpha folded in, every scaling 1. On the
aligned anchor nothing else is needed. On the base anchor whatever else alignment changed (norms, biases, tensors that
are not selected) comes along whole, in the adapter's `modules_to_save`.

What an adapter cannot hold exactly is refused by name, or left out and said so: an adapter on a tied embedding
changes the embedding and not the head that shares its memory, so there `--edit linear` applies.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.adapter_carried import Carried
from surgery.adapter_names import (
    WAY_OUT,
    Names,
    Place,
    build_model,
    nowhere,
    require_same_config,
    tied_parameters,
)
from surgery.adapter_peft import Piece, adapt, block_factors
from surgery.checkpoint.dtypes import code_of
from surgery.checkpoint.header import build_header
from surgery.checkpoint.layout import Checkpoint
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.staging import Staging
from surgery.checkpoint.writer import ShardFile, Written, write_file
from surgery.editing import Editor, Record, as_bytes, require_finite, update_figures
from surgery.edits import in_work_order
from surgery.errors import InputError, UsageError
from surgery.inputs import InputHashes
from surgery.methods.base import WeightEdit, WeightUpdate
from surgery.plan import Step, output_size
from surgery.selection import kind_of, text_config
from surgery.spectral import Factors

if TYPE_CHECKING:
    from surgery.edits import Progress
    from surgery.job import PairJob

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_Method = TypeVar("_Method", bound=WeightEdit)


def ties_embeddings(checkpoint: Checkpoint) -> bool:
    """Whether the input embedding is also the output head.

    It is where config.json says so, and where config.json says nothing and no head is stored.
    """
    flag = text_config(checkpoint.config).get("tie_word_embeddings")
    heads = any(kind_of(info, checkpoint.config) == "head" for info in checkpoint.tensors.values())
    return flag is True or (flag is None and not heads)


def adapter_method(method: _Method, aligned: Checkpoint) -> tuple[_Method, str]:
    """The method as an adapter can carry it out, and a note for the plan (empty where nothing changes).

    Raises:
        UsageError: The rank is full.
    """
    if getattr(method, "rank", None) == "full":
        raise UsageError(
            f"rank is full, and an adapter needs a rank; choose --rank INT or auto, or {WAY_OUT}"
        )
    if getattr(method, "edit", "linear") == "linear" or not ties_embeddings(aligned):
        return method, ""
    note = (
        f"{aligned.label} ties its embeddings to its head, and an adapter on a tied embedding is not the merged "
        "model: embeddings, head and routers are not edited (--edit linear)"
    )
    values = {entry.name: getattr(method, entry.name) for entry in dataclasses.fields(method)}
    return type(method)(**{**values, "edit": "linear"}), note


def edit_places(
    method: WeightEdit, aligned: Checkpoint, base: Checkpoint, steps: Mapping[str, Step], model: nn.Module
) -> tuple[Names, dict[str, Place]]:
    """Where every tensor that is to be edited lies in the anchor's model, from headers alone.

    Raises:
        InputError: One lies nowhere, or where an adapter cannot edit it exactly; the message names it.
    """
    if method.anchor == "base":
        require_same_config(aligned, base)
    names, tied, places = Names(aligned.tensors, model), tied_parameters(model), {}
    for step in steps.values():
        if step.action == "edit":
            _refuse_fp8(step)
            place = names.place(step.name)
            if place is None:
                raise nowhere(step.name)
            if place.parameter in tied:
                raise InputError(
                    f"{step.name} shares its memory with another parameter, so an adapter on it is not the merged "
                    f"model; use --edit linear, or {WAY_OUT}"
                )
            places[step.name] = place
    return names, places


def _refuse_fp8(step: Step) -> None:
    weight = step.weight or step
    if weight.scaling is not None or weight.base_scaling is not None:
        raise InputError(
            f"{weight.name} is stored in fp8, and an adapter is exact on wider floats only; {WAY_OUT}"
        )


def refuse_unplaceable(
    method: WeightEdit, aligned: Checkpoint, base: Checkpoint, steps: Mapping[str, Step]
) -> None:
    """Refuse, from headers and configs alone, an edit that an adapter cannot hold.

    Raises:
        InputError: See `edit_places`; or transformers cannot build the anchor's model without running its code.
    """
    edit_places(method, aligned, base, steps, build_model(aligned if method.anchor == "aligned" else base))


def adapter_size(method: WeightEdit, steps: Mapping[str, Step]) -> int:
    """Bytes that an adapter takes, roughly: float32 factors, and on the base anchor all that is not edited."""
    size = 0
    for step in steps.values():
        if step.action == "edit":
            matrices = math.prod(step.shape[:-2]) * max(1, len(step.slices))
            size += 4 * (step.rank or 0) * matrices * sum(step.shape[-2:])
        elif method.anchor == "base":
            size += output_size(step)
    return size


@dataclass
class _Gathered:
    """Pieces of edits by parameter, tensors that are not edited and that the anchor lacks, and records."""

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    differing: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


def write_adapter(
    job: "PairJob", staging: Staging, hashes: InputHashes, progress: "Progress | None"
) -> list[Record]:
    """Write `adapter_model.safetensors` and `adapter_config.json`; return one record per tensor of the aligned model.

    An interrupted run is done again as a whole: it takes as long as reading the inputs.

    Raises:
        InputError: An adapter cannot hold the edit exactly; the message names the tensor.
    """
    anchor = job.aligned if job.method.anchor == "aligned" else job.base
    model = build_model(anchor)
    names, places = edit_places(job.method, job.aligned, job.base, job.plan.steps, model)
    with Reader(job.aligned) as aligned, Reader(job.base) as base:
        gathered = _Gather(job, aligned, base, names, places).run(hashes, progress)
        if not gathered.pieces:
            return gathered.records
        carried = Carried(gathered.pieces, gathered.differing, names, model, job.aligned)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict(keep_vars=True).items()}
        factors = {name: block_factors(shapes[name], pieces) for name, pieces in gathered.pieces.items()}
        ranks = {name: left.shape[-1] for name, (left, _) in factors.items()}
        config, adapted = adapt(ranks, carried.modules, lambda: build_model(anchor), tied=carried.tied)
        tensors: dict[str, Tensor | str] = {}
        for name, (left, right) in factors.items():
            tensors |= adapted.lora_tensors(name, left, right)
        tensors |= {key: carried.source(parameter) for key, parameter in adapted.saved().items()}
        entries = [_entry(name, value, job.aligned) for name, value in tensors.items()]
        adapted.require_loads({entry.name: entry.shape for entry in entries})
        _write(staging, entries, {**_identity(job), **config}, aligned)
    return gathered.records


def _identity(job: "PairJob") -> dict[str, Any]:
    """Which model the adapter belongs to, pinned where it has a commit."""
    source = job.sources[job.method.anchor]
    return {"base_model_name_or_path": source.repository or source.label, "revision": source.commit}


@dataclass(frozen=True)
class _Entry:
    """One tensor of the adapter: itself, or the name under which the aligned checkpoint holds it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    value: Tensor | str

    @property
    def order(self) -> tuple[int, str]:
        """Wide dtypes first, so that all are aligned in the file; then by name."""
        return -self.nbytes // max(1, math.prod(self.shape)), self.name


def _entry(name: str, value: Tensor | str, aligned: Checkpoint) -> _Entry:
    if isinstance(value, str):
        info = aligned.tensors[value]
        return _Entry(name, info.dtype, info.shape, info.nbytes, value)
    return _Entry(name, code_of(value.dtype), tuple(value.shape), value.nbytes, value)


def _write(staging: Staging, entries: Sequence[_Entry], config: Mapping[str, Any], aligned: Reader) -> None:
    """Write both files and journal them."""
    entries = sorted(entries, key=lambda entry: entry.order)
    described = [(entry.name, entry.dtype, entry.shape, entry.nbytes) for entry in entries]
    header = build_header(described, {"format": "pt"})
    size = len(header) + sum(entry.nbytes for entry in entries)
    with ShardFile(staging.path / WEIGHTS, header, size) as file:
        for entry in entries:
            value = entry.value
            file.write(as_bytes(aligned.read(value) if isinstance(value, str) else value))
        weights = file.close()
    text = json.dumps(dict(config), indent=2, sort_keys=True).encode() + b"\n"
    for name, written in ((WEIGHTS, weights), (CONFIG, write_file(staging.path / CONFIG, text))):
        _journal(staging, name, written)


def _journal(staging: Staging, name: str, written: Written) -> None:
    entry = {"shard": name, **dataclasses.asdict(written)}
    staging.record(entry)
    staging.entries.append(entry)


class _Gather:
    """Computes all edits, shard by shard, and finds out what else a base anchor lacks."""

    def __init__(
        self, job: "PairJob", aligned: Reader, base: Reader, names: Names, places: Mapping[str, Place]
    ) -> None:
        self._job, self._aligned, self._base = job, aligned, base
        self._names, self._places = names, places
        self._editor = Editor(job.method, job.options, aligned, base)
        self._found = _Gathered()

    def run(self, hashes: InputHashes, progress: "Progress | None") -> _Gathered:
        """Go through all tensors in the order of the files."""
        shards = self._job.aligned.shards
        with closing(in_work_order(self._job, shards, self._editor.updates)) as updates:
            for number, shard in enumerate(shards, 1):
                hashes.begin("aligned", shard)
                for step in (self._job.plan.steps[info.name] for info in shard.header.tensors):
                    edits = step.action == "edit"
                    self._found.records.append(self._edit(step, next(updates)) if edits else self._copy(step))
                if progress is not None:
                    progress(shard.output_name, number, len(shards))
        return self._found

    def _edit(self, step: Step, updates: Sequence[WeightUpdate | None]) -> Record:
        done = [
            (part, update) for part, update in zip(step.slices or (None,), updates, strict=True) if update
        ]
        if not done:
            return {"name": step.name, "action": "unchanged", "reason": "alignment left it unchanged"}
        if self._job.method.anchor == "aligned":
            anchor = self._aligned.read(step.name)
        else:
            anchor = self._base.read(step.base or step.name)
        place = self._places[step.name]
        pieces = self._found.pieces.setdefault(place.parameter, [])
        weights = []
        for part, update in done:
            row, column = 0, 0
            if part is not None:
                axis = part.axis % len(step.shape) - len(step.shape)
                row, column = (part.start, 0) if axis == -2 else (0, part.start)
            pieces += _pieces(step.name, place, update, row, column)
            weights.append(_norm(part.of(anchor) if part is not None else anchor))
        return _record(step, [update for _, update in done], math.hypot(*weights))

    def _copy(self, step: Step) -> Record:
        """The record of a tensor that is not edited; on a base anchor, whether it must be carried."""
        record: Record = {"name": step.name, "action": "copy", "reason": step.reason}
        if (
            self._job.method.anchor == "base"
            and self._names.place(step.name) is not None
            and self._differs(step)
        ):
            self._found.differing.append(step.name)
            record["reason"] += ", differs from base, carried whole"
        return record

    def _differs(self, step: Step) -> bool:
        aligned = self._aligned.read(step.name)
        if self._job.aligned.tensors[step.name].is_float:
            require_finite(aligned, step.name, "aligned")
        if step.base is None:
            return True
        base = self._base.read(step.base)
        return base.shape != aligned.shape or not bool((base == aligned).all())


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64))


def _pieces(name: str, place: Place, update: WeightUpdate, row: int, column: int) -> list[Piece]:
    """The blocks of a parameter that an update edits."""
    factors = update.edit
    if not isinstance(factors, Factors):
        raise UsageError(
            f"the edit of {name} has full rank, and an adapter needs a rank; leave out --as-lora"
        )
    parts = factors.left.cpu(), factors.values.cpu(), factors.right.cpu()
    row += place.row
    if parts[1].dim() == 1:
        return [Piece(Factors(*parts), row, column, place.expert)]
    return [Piece(Factors(*one), row, column, expert) for expert, one in enumerate(zip(*parts, strict=True))]


def _record(step: Step, updates: Sequence[WeightUpdate], weight: float) -> Record:
    """Figures of an edited tensor, as `surgery.editing` gives them; nothing is lost, since nothing is rounded."""
    edits = (update.edit for update in updates)
    norm = math.hypot(*(_norm(edit.values if isinstance(edit, Factors) else edit) for edit in edits))
    return {
        **update_figures(step, updates),
        "edit_norm": norm,
        "edit_to_weight": norm / weight if weight else None,
        "retention": 1.0,
        "noise": 0.0,
        "noise_spectral": 0.0,
        "rounding": "none",
        "iterations": 0,
        "changed": None,
    }
