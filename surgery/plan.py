"""What will happen to every tensor, and why; made from headers alone, before a byte is written."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.layout import Checkpoint
from surgery.checkpoint.quantised import Scaling, scalings
from surgery.checkpoint.sidecars import Sidecars
from surgery.errors import InputError, UsageError
from surgery.fused import Slice, fused_slices
from surgery.methods.base import WeightEdit
from surgery.order import Roles
from surgery.pairing import Pairing, pair_names
from surgery.selection import kind_of

# Computed from the config, or by a quantiser, and saved with the weights; alignment does not train them.
_BUFFERS = re.compile(
    r"(inv_freq|masked_bias|attn\.bias|position_ids|(cos|sin)_cached|\.(input|activation)_scale)$"
)
_DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Step:
    """What happens to one tensor of the aligned checkpoint.

    Attributes:
        name: Its name, also in the output.
        action: "edit" or "copy".
        reason: Why, in a few words.
        shape: Its shape.
        dtype: Its dtype in the output, as safetensors spells it.
        rank: The largest rank its edit can have; None for a copy.
        base: The name of its partner in the base checkpoint; None without one.
        slices: The parts that are edited as matrices of their own; empty where the tensor is edited whole.
        scaling: How it is stored in block-scaled fp8, in the aligned checkpoint and in the output; None otherwise.
        base_scaling: The same for its partner in the base checkpoint.
        weight: For a tensor that holds the scales of an edited weight, the weight's step.
        workspace: Bytes that its edit needs beside the weights, the result and what every edit needs.
    """

    name: str
    action: str
    reason: str
    shape: tuple[int, ...]
    dtype: str
    rank: int | None = None
    base: str | None = None
    slices: tuple[Slice, ...] = ()
    scaling: Scaling | None = None
    base_scaling: Scaling | None = None
    weight: "Step | None" = None
    workspace: int = 0

    def row(self) -> dict[str, Any]:
        """The step as the plan's JSON shows it."""
        keys = ("name", "action", "reason", "shape", "dtype", "rank")
        return {key: list(value) if isinstance(value := getattr(self, key), tuple) else value for key in keys}


@dataclass(frozen=True)
class Plan:
    """Every tensor of the aligned checkpoint with its step, and what the run will cost.

    Attributes:
        steps: By tensor name, in the order of the files.
        notes: What the user should know, one sentence each.
        roles: Evidence for which checkpoint is which.
        sidecars: Which side files travel.
        bytes_read: Tensor bytes read from both checkpoints.
        bytes_written: Bytes of the output's tensors and side files.
        memory_bytes: Estimate of the peak resident memory.
        seconds_estimate: Rough estimate of the run's wall time.
        disk_free: Bytes free where the output goes.
        drops_rest: Whether the edited tensors keep of the alignment update only what was decomposed.
    """

    steps: Mapping[str, Step]
    equation: str
    equivalent: str
    notes: tuple[str, ...]
    roles: Roles
    sidecars: Sidecars
    bytes_read: int
    bytes_written: int
    memory_bytes: int
    seconds_estimate: float
    disk_free: int
    drops_rest: bool = False

    @property
    def edits(self) -> tuple[Step, ...]:
        """The steps that edit."""
        return tuple(step for step in self.steps.values() if step.action == "edit")

    def document(self) -> dict[str, Any]:
        """The plan as `--plan --json` prints it."""
        return {
            "tensors": [step.row() for step in self.steps.values()],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "disk_free": self.disk_free,
            "memory_bytes": self.memory_bytes,
            "seconds_estimate": round(self.seconds_estimate, 1),
            "equation": self.equation,
            "notes": list(self.notes),
            "roles": self.roles.summary(),
            "sidecars": list(self.sidecars.carried),
            "left_behind": [{"file": file, "reason": reason} for file, reason in self.sidecars.left],
        }


def plan_steps(
    method: WeightEdit, aligned: Checkpoint, base: Checkpoint, *, dtype: str
) -> tuple[dict[str, Step], tuple[str, ...]]:
    """A step for every tensor of `aligned`, and notes.

    Raises:
        InputError: The two checkpoints cannot be paired tensor by tensor.
        UsageError: Nothing is selected, the rank is too large for every selected tensor, or fp8 is to be cast.
    """
    sides = _Side(aligned), _Side(base)
    pairing = pair_names(*(side.weights for side in sides))
    _refuse_cast(sides[0], dtype)
    note = _refuse_leftovers(method, *sides, pairing)
    planner = _Planner(method, *sides, pairing, dtype)
    steps = {info.name: planner.step(info) for shard in aligned.shards for info in shard.header.tensors}
    planner.refuse_mismatches()
    edits = [step for step in steps.values() if step.action == "edit" and step.weight is None]
    if not edits:
        raise UsageError(
            "the options select no tensor to edit; loosen --include, --exclude, --layers, --depth or --edit"
        )
    _refuse_rank(method, edits)
    return steps, tuple(note for note in (pairing.note, note, *planner.notes) if note)


def output_dtype(info: TensorInfo, dtype: str) -> str:
    """The dtype a tensor has in the output under `--dtype`."""
    return _DTYPE_CODES.get(dtype, info.dtype) if info.is_float else info.dtype


def output_size(step: Step) -> int:
    """Bytes of a tensor in the output."""
    return math.prod(step.shape) * BITS[step.dtype] // 8


def _top_module(name: str) -> str:
    return name.partition(".")[0]


def _wrapped_module(name: str) -> str:
    """The module below a wrapper (`model.vision_tower`), the top one where there is no wrapper."""
    parts = name.split(".")
    wrapped = parts[0] in ("model", "transformer", "language_model") and len(parts) > 2
    return ".".join(parts[:2]) if wrapped else parts[0]


class _Side:
    """One checkpoint as it is computed with.

    Attributes:
        checkpoint: What it is made from.
        scalings: How its fp8 weights are scaled, by their names.
        scaled: The weight whose scales a tensor holds, by the tensor's name.
        weights: Every tensor but those, by name; weights in fp8 count as the float32 ones that they stand for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.scalings = checkpoint, scalings(checkpoint)
        self.scaled = {scaling.name: weight for weight, scaling in self.scalings.items()}
        self.weights = {
            name: replace(info, dtype="F32") if name in self.scalings else info
            for name, info in checkpoint.tensors.items()
            if name not in self.scaled
        }

    def lacks_module(self, name: str) -> bool:
        """Whether it wholly lacks the module a tensor belongs to: an extra head, a vision tower."""
        top, wrapped = _top_module(name), _wrapped_module(name)
        own = not any(_top_module(other) == top for other in self.weights)
        return own or not any(other.startswith(wrapped + ".") for other in self.weights)


def _refuse_cast(aligned: _Side, dtype: str) -> None:
    if dtype != "keep" and aligned.scalings:
        raise UsageError(
            f"dtype is {dtype}, and {next(iter(aligned.scalings))} is stored in fp8, which keeps its dtype; leave "
            "out --dtype, or save the model with FineGrainedFP8Config(dequantize=True) and edit that"
        )


def _refuse_leftovers(method: WeightEdit, aligned: _Side, base: _Side, pairing: Pairing) -> str:
    """A note on the tensors that only aligned has, empty where there are none.

    Raises:
        InputError: One side lacks tensors that it should have.
    """
    missing = [name for name in pairing.only_base if not _named_by_exclude(method, name)]
    if missing:
        raise InputError(
            f"the base checkpoint has {len(missing)} tensors that the aligned one lacks, first {missing[0]}; "
            f"if they do not matter, name them: --exclude '{re.escape(missing[0])}'"
        )
    for name in pairing.only_aligned:
        if _needs_partner(method, aligned, name) and not _is_new(aligned, base, pairing, name):
            raise InputError(
                f"the aligned checkpoint has {name}, the base has no such tensor, so its change is unknown; "
                f"to copy it as it is: --exclude '{re.escape(name)}'"
            )
    if not pairing.only_aligned:
        return ""
    return (
        f"only the aligned checkpoint has {len(pairing.only_aligned)} of its tensors, first "
        f"{pairing.only_aligned[0]}: copied as they are"
    )


def _needs_partner(method: WeightEdit, aligned: _Side, name: str) -> bool:
    """Whether a tensor's change matters and no option named it: not so for whole numbers and computed buffers."""
    info, config = aligned.weights[name], aligned.checkpoint.config
    if method.choose(info, config).edit:
        return True
    trained = kind_of(info, config) in ("vector", "other shape") and not _BUFFERS.search(name)
    return trained and not _named_by_exclude(method, name)


def _is_new(aligned: _Side, base: _Side, pairing: Pairing, name: str) -> bool:
    """Whether a tensor belongs to a part that alignment added; a head that it added is a change of the model."""
    if kind_of(aligned.weights[name], aligned.checkpoint.config) == "head":
        return False
    return base.lacks_module(pairing.base_name(name))


def _named_by_exclude(method: WeightEdit, name: str) -> bool:
    pattern = getattr(method, "exclude", None)
    return isinstance(pattern, str) and re.search(pattern, name) is not None


def _refuse_rank(method: WeightEdit, edits: Sequence[Step]) -> None:
    asked = getattr(method, "rank", None)
    largest = max((step.rank or 0, step.name) for step in edits)
    if isinstance(asked, int) and asked > largest[0]:
        raise UsageError(
            f"rank is {asked}, but no selected tensor has more than {largest[0]} ({largest[1]}); "
            f"choose --rank {largest[0]} or less, or --rank full"
        )


def _refuse_cut_blocks(info: TensorInfo, slices: Sequence[Slice], scaling: Scaling) -> None:
    """Refuse parts that share blocks of fp8: one scale cannot be chosen for two edits."""
    for part in slices:
        height, whole = scaling.block[part.axis % len(info.shape) - len(info.shape)], info.shape[part.axis]
        if part.start % height or (part.stop % height and part.stop != whole):
            raise InputError(
                f"{info.name} is in fp8 with blocks of {list(scaling.block)}, and rows or columns {part.start} to "
                f"{part.stop - 1} do not end with one; leave out --split-fused, or --exclude '{re.escape(info.name)}'"
            )


class _Planner:
    """Makes steps one by one and collects what does not fit, so that one error can tell how much."""

    def __init__(self, method: WeightEdit, aligned: _Side, base: _Side, pairing: Pairing, dtype: str) -> None:
        self._method, self._aligned, self._base = method, aligned, base
        self._config = aligned.checkpoint.config
        self._pairing, self._dtype = pairing, dtype
        self._mismatches: list[str] = []
        self._weights: dict[str, Step] = {}
        self.notes: list[str] = []

    def step(self, info: TensorInfo) -> Step:
        """The step of one tensor; that of scales follows from their weight's."""
        weight = self._aligned.scaled.get(info.name)
        if weight is None:
            return self._weight(info.name)
        reason, of = f"scale of {weight}", self._weight(weight)
        if of.action == "copy":
            return Step(info.name, "copy", reason, info.shape, info.dtype)
        return Step(info.name, "edit", reason, info.shape, info.dtype, weight=of)

    def _weight(self, name: str) -> Step:
        """The step of a tensor that holds no scales, made once: its scales may come before it."""
        if name not in self._weights:
            self._weights[name] = self._chosen(self._aligned.weights[name])
        return self._weights[name]

    def _chosen(self, info: TensorInfo) -> Step:
        choice = self._method.choose(info, self._config)
        partner = self._pairing.partner.get(info.name)
        if not choice.edit or partner is None:
            reason = (
                choice.reason
                if not choice.edit
                else f"only in aligned: base has no {_wrapped_module(info.name)}"
            )
            return self._copy(info, reason, partner)
        other = self._base.weights[partner]
        if not other.is_float:
            raise InputError(
                f"{info.name} is {info.dtype} in the aligned checkpoint and {other.dtype} in the base; "
                "both must be floating point"
            )
        if other.shape != info.shape:
            return self._reshaped(info, other)
        slices = fused_slices(info, self._config) if getattr(self._method, "split_fused", False) else ()
        return self._edit(info, choice.reason, partner, slices)

    def _copy(self, info: TensorInfo, reason: str, partner: str | None) -> Step:
        return Step(info.name, "copy", reason, info.shape, self._output_dtype(info), base=partner)

    def _output_dtype(self, info: TensorInfo) -> str:
        """The dtype in the output; weights in fp8 keep theirs."""
        return output_dtype(self._aligned.checkpoint.tensors[info.name], self._dtype)

    def _edit(self, info: TensorInfo, reason: str, partner: str, slices: tuple[Slice, ...] = ()) -> Step:
        scaling = self._aligned.scalings.get(info.name)
        if scaling is not None:
            _refuse_cut_blocks(info, slices, scaling)
        shapes = [part.shape(info.shape) for part in slices] or [info.shape]
        rank = max(self._method.planned_rank(*shape[-2:]) for shape in shapes)
        asked = getattr(self._method, "rank", None)
        if isinstance(asked, int) and rank < asked:
            reason = f"{reason}, rank capped at {rank}"
        dtype, other = self._output_dtype(info), self._base.scalings.get(partner)
        return Step(info.name, "edit", reason, info.shape, dtype, rank, partner, slices, scaling, other)

    def _reshaped(self, info: TensorInfo, other: TensorInfo) -> Step:
        """A vocabulary that grew or shrank, under the policy asked for; any other shape is a mismatch."""
        vocabulary = (
            kind_of(info, self._config) in ("embedding", "head") and info.shape[1:] == other.shape[1:]
        )
        policy = getattr(self._method, "vocab", "error")
        mine, theirs = info.shape[0], other.shape[0]
        if vocabulary and policy == "skip":
            self.notes.append(
                f"{info.name}: {mine} rows against {theirs} in base, copied whole (--vocab skip)"
            )
            return self._copy(info, "vocabulary differs, --vocab skip", None)
        if vocabulary and policy == "common-rows":
            common = min(mine, theirs)
            self.notes.append(
                f"{info.name}: rows 0 to {common - 1} are edited"
                + (f", rows {common} to {mine - 1} copied" if mine > common else "")
                + f" ({mine} rows against {theirs} in base)"
            )
            return self._edit(info, "common rows", other.name, (Slice(0, 0, common),))
        way_out = (
            "add --vocab common-rows or --vocab skip"
            if vocabulary
            else "check that base is what it was made from"
        )
        self._mismatches.append(
            f"{info.name} is {list(info.shape)} in aligned and {list(other.shape)} in base; {way_out}"
        )
        return self._copy(info, "shape differs", None)

    def refuse_mismatches(self) -> None:
        """Raise for the first shape that does not fit, saying how many there are."""
        if self._mismatches:
            count = len(self._mismatches)
            more = f" ({count} tensors differ in shape)" if count > 1 else ""
            raise InputError(self._mismatches[0] + more)


def seconds_estimate(steps: Mapping[str, Step], bytes_moved: int, cores: int) -> float:
    """Rough wall time in seconds, from rates measured on two cores of a server: right within a small factor."""
    edits = [step for step in steps.values() if step.action == "edit"]
    entries = sum(math.prod(step.shape) for step in edits)
    work = _SECONDS_PER_TENSOR * len(edits) + _CORE_SECONDS_PER_ENTRY * entries / cores
    return _STARTUP_SECONDS + work + bytes_moved / _BYTES_PER_SECOND


_STARTUP_SECONDS = 2.0
# Small factorisations and the certificate cost about the same for every matrix; products grow with its entries.
_SECONDS_PER_TENSOR = 0.08
_CORE_SECONDS_PER_ENTRY = 0.12e-6
_BYTES_PER_SECOND = 300e6
