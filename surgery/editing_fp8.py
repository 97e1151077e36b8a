"""Edits of weights in block-scaled fp8, of which codes and scales are two tensors.

The edit gives both at once, and the file asks for them one by one: the scales often first, since safetensors files
begin with the wider dtypes, or from another shard. What the second of the two needs is kept until it is asked for:
the scales (small), or the factors of the edit, from which one pass gives the codes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint.fp8 import Scaled
from surgery.fused import Slice
from surgery.methods.base import Anchor, WeightUpdate
from surgery.options import Options
from surgery.plan import Step
from surgery.rounding_fp8 import StoredFp8, replay, store_fp8
from surgery.spectral import Factors

_Record = dict[str, Any]
_Source = Tensor | Scaled
_Update = Callable[[Tensor, Tensor, str], WeightUpdate | None]
_Done = list[tuple[WeightUpdate, StoredFp8]]

LARGEST_KEPT = 256 << 20
"""Bytes of factors kept at most; of edits beyond that the codes are computed anew."""


@dataclass(frozen=True)
class _Part:
    """One part of a weight with its edit: all that its codes depend on beside the files."""

    part: Slice | None
    name: str
    edit: Factors | Tensor
    cores: tuple[Tensor, ...]
    mode: str

    @property
    def nbytes(self) -> int:
        """Bytes of the edit."""
        parts = [self.edit] if isinstance(self.edit, Tensor) else [self.edit.left, self.edit.right]
        return sum(part.nbytes for part in parts)


@dataclass(frozen=True)
class _Edit:
    """What is known of an edited weight: its scales, None where alignment left it unchanged, parts and record."""

    scales: Tensor | None
    parts: tuple[_Part, ...]
    record: _Record
    blocks: str

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in self.parts)


class Fp8Edits:
    """Codes and scales of edited weights; several threads may share it.

    Args:
        anchor: What edits are added to.
        options: How to round, and the seed.
        sources: The weight of a step in the aligned and in the base checkpoint.
        update: The edit of one matrix, or None where the two are equal.
        record: The record of a step from what was done to its parts.
    """

    def __init__(
        self,
        anchor: Anchor,
        options: Options,
        sources: Callable[[Step], tuple[_Source, _Source]],
        update: _Update,
        record: Callable[[Step, Sequence[Any]], _Record],
    ) -> None:
        self._anchor, self._options = anchor, options
        self._sources, self._update, self._record = sources, update, record
        self._kept: dict[str, _Edit] = {}
        self._locks: dict[str, Lock] = {}
        self._lock = Lock()

    def codes(self, step: Step) -> tuple[Tensor | None, _Record]:
        """The edited codes of a weight, None where alignment left it unchanged, and their record."""
        with self._of(step.name):
            known = self._kept.pop(step.name, None)
            if known is not None and (known.parts or known.scales is None):
                return self._replayed(step, known), known.record
            out, known = self._compute(step)
            self._kept[step.name] = _Edit(known.scales, (), known.record, known.blocks)
            return (out.codes.cpu() if known.scales is not None else None), known.record

    def scales(self, step: Step, weight: Step) -> tuple[Tensor | None, _Record]:
        """The scales of the edited weight, None where alignment left it unchanged, and their record."""
        with self._of(weight.name):
            known = self._kept.pop(weight.name, None)
            if known is None:
                known = self._compute(weight)[1]
                self._keep(weight.name, known)
        if known.scales is None:
            return None, {"name": step.name, "action": "copy", "reason": f"{step.reason}, which is unchanged"}
        return known.scales.cpu(), {
            "name": step.name,
            "action": "scale",
            "reason": f"{step.reason}, {known.blocks}",
        }

    def _of(self, name: str) -> Lock:
        """The lock of a weight: of two threads that need its edit one computes it."""
        with self._lock:
            return self._locks.setdefault(name, Lock())

    def _keep(self, name: str, known: _Edit) -> None:
        with self._lock:
            if sum(edit.nbytes for edit in self._kept.values()) + known.nbytes <= LARGEST_KEPT:
                self._kept[name] = known

    def _pair(self, step: Step) -> tuple[Scaled, _Source]:
        aligned, base = self._sources(step)
        if not isinstance(aligned, Scaled):
            raise TypeError(f"{step.name} is not stored in fp8")
        return aligned, base

    def _compute(self, step: Step) -> tuple[Scaled, _Edit]:
        """The edited weight, and what is to be known of it."""
        aligned, base = self._pair(step)
        out = Scaled(aligned.codes.clone(), aligned.scales.clone(), aligned.scaling)
        done: _Done = []
        parts: list[_Part] = []
        for part, name in _named_parts(step):
            one, other = _part(aligned, part), _part(base, part)
            update = self._update(_numbers(one), _numbers(other), name)
            if update is None:
                continue
            anchor = one if self._anchor == "aligned" else other
            stored = store_fp8(
                anchor,
                update.edit,
                aligned.scaling,
                aligned.scales.dtype,
                mode=self._options.rounding,
                seed=self._options.seed,
                name=name,
            )
            done.append((update, stored))
            parts.append(_Part(part, name, update.edit, stored.cores, stored.mode))
            _place(out, part, stored.weight)
        fresh, blocks = sum(stored.fresh for _, stored in done), out.scales.numel()
        told = f"{fresh} of {blocks} new"
        return out, _Edit(out.scales if done else None, tuple(parts), self._record(step, done), told)

    def _replayed(self, step: Step, known: _Edit) -> Tensor | None:
        """The codes of an edit whose scales were asked for first."""
        if known.scales is None:
            return None
        aligned, base = self._pair(step)
        out = Scaled(aligned.codes.clone(), known.scales, aligned.scaling)
        for each in known.parts:
            anchor = _part(aligned if self._anchor == "aligned" else base, each.part)
            scales = out.scales if each.part is None else _blocks(each.part, out).of(out.scales)
            found = replay(
                anchor,
                each.edit,
                aligned.scaling,
                scales,
                each.cores,
                mode=each.mode,
                seed=self._options.seed,
                name=each.name,
            )
            _place(out, each.part, found)
        return out.codes.cpu()


def _named_parts(step: Step) -> list[tuple[Slice | None, str]]:
    """The parts of a weight with the names that their random numbers go by; the whole where there is none."""
    if not step.slices:
        return [(None, step.name)]
    return [(part, f"{step.name}[{number}]") for number, part in enumerate(step.slices)]


def _numbers(source: _Source) -> Tensor:
    return source if isinstance(source, Tensor) else source.dequantised()


def _blocks(part: Slice, source: Scaled) -> Slice:
    """The part of the scales that belongs to a part of the codes, which ends where blocks end."""
    axis = part.axis % source.codes.dim() - source.codes.dim()
    block = source.scaling.block[axis]
    return Slice(part.axis, part.start // block, -(-part.stop // block))


def _ends_with_blocks(part: Slice, source: Scaled) -> bool:
    blocks, axis = _blocks(part, source), part.axis % source.codes.dim() - source.codes.dim()
    block, whole = source.scaling.block[axis], source.codes.shape[axis]
    return blocks.start * block == part.start and min(blocks.stop * block, whole) == part.stop


def _part(source: _Source, part: Slice | None) -> _Source:
    """A part of a weight, contiguous."""
    if part is None:
        return source
    if isinstance(source, Scaled) and not _ends_with_blocks(part, source):
        source = source.dequantised()
    if isinstance(source, Tensor):
        return part.of(source).contiguous()
    codes = part.of(source.codes.view(torch.uint8)).contiguous().view(torch.float8_e4m3fn)
    return Scaled(codes, _blocks(part, source).of(source.scales).contiguous(), source.scaling)


def _place(out: Scaled, part: Slice | None, stored: Scaled) -> None:
    """Write a part into the weight."""
    codes, scales = out.codes.view(torch.uint8), out.scales
    if part is not None:
        codes, scales = part.of(codes), _blocks(part, out).of(scales)
    codes.copy_(stored.codes.view(torch.uint8))
    scales.copy_(stored.scales)
