"""One tensor of the output: edited or copied, with the figures that the manifest keeps.

Nothing here knows of files beyond the readers, so the run and its later verification share it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint.dtypes import torch_dtype
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.reader import Reader
from surgery.errors import InputError, OutputError, UsageError
from surgery.methods.base import WeightEdit, WeightUpdate
from surgery.options import Options
from surgery.plan import Step
from surgery.rounding import Stored, store

Record = dict[str, Any]


@dataclass(frozen=True)
class Edited:
    """The new value of a tensor, None where alignment left it unchanged, and its record."""

    tensor: Tensor | None
    record: Record


def require_finite(tensor: Tensor, name: str, where: str) -> None:
    """Raise InputError naming the tensor if a value is NaN or infinite."""
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(
            f"{name} in the {where} checkpoint holds NaN or infinity; such weights cannot be edited"
        )


def compute_device(options: Options) -> torch.device:
    """The device that `--device` asks for.

    Raises:
        UsageError: There is none of that name, or it cannot be used here.
    """
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise UsageError(
            f"device {options.device!r} cannot be used here; there is {', '.join(there)}: try --device cpu"
        ) from None
    return device


class Editor:
    """Edits tensors of a pair of checkpoints by one method."""

    def __init__(self, method: WeightEdit, options: Options, aligned: Reader, base: Reader) -> None:
        self._method, self._options = method, options
        self._aligned, self._base = aligned, base
        self._device = compute_device(options)

    def pair(self, step: Step) -> tuple[Tensor, Tensor]:
        """The tensor in the aligned and in the base checkpoint, finite, on the device.

        Raises:
            InputError: A value is NaN or infinite.
        """
        aligned = self._aligned.read(step.name)
        require_finite(aligned, step.name, "aligned")
        base = self._base.read(step.base or step.name)
        require_finite(base, step.base or step.name, "base")
        return aligned.to(self._device), base.to(self._device)

    def require_finite_base(self, step: Step) -> None:
        """Refuse a base whose partner of a tensor that is not edited holds NaN or infinity: the file is damaged."""
        info = self._base.info(step.base) if step.base else None
        if info is not None and info.is_float:
            for chunk in self._base.raw(info.name):
                require_finite(torch.frombuffer(chunk, dtype=torch_dtype(info.dtype)), info.name, "base")

    def updates(self, step: Step) -> list[WeightUpdate | None]:
        """The full-precision update of each part of a tensor (one part where it is edited whole)."""
        aligned, base = self.pair(step)
        return [self._update(one, other, name) for one, other, name in self._parts(step, aligned, base)]

    def edit(self, step: Step) -> Edited:
        """The edited tensor in the output's dtype, with its record.

        Raises:
            InputError: A value is NaN or infinite, or the result does not fit the dtype.
            OutputError: The edit is not zero and yet not a byte would change.
        """
        aligned, base = self.pair(step)
        dtype = torch_dtype(step.dtype)
        out, done = aligned.to(dtype, copy=True), []
        targets = [part.of(out) for part in step.slices] or [out]
        for target, (one, other, name) in zip(targets, self._parts(step, aligned, base), strict=True):
            update = self._update(one, other, name)
            if update is None:
                continue
            anchor = one if self._method.anchor == "aligned" else other
            stored = store(
                anchor, update.edit, dtype, mode=self._options.rounding, seed=self._options.seed, name=name
            )
            target.copy_(stored.weight)
            done.append((update, stored, float(torch.linalg.vector_norm(anchor, dtype=torch.float64))))
        if not done:
            return Edited(
                None, {"name": step.name, "action": "unchanged", "reason": "alignment left it unchanged"}
            )
        record = _record(step, done)
        _require_change(record)
        return Edited(out.cpu(), record)

    def _parts(self, step: Step, aligned: Tensor, base: Tensor) -> Iterator[tuple[Tensor, Tensor, str]]:
        if not step.slices:
            yield aligned, base, step.name
        for number, part in enumerate(step.slices):
            yield part.of(aligned).contiguous(), part.of(base).contiguous(), f"{step.name}[{number}]"

    def _update(self, aligned: Tensor, base: Tensor, name: str) -> WeightUpdate | None:
        """The update of one part; None where the two are equal."""
        if bool((aligned == base).all()):
            return None
        return self._method.update(aligned, base, name=name, seed=self._options.seed)


def update_figures(step: Step, updates: Sequence[WeightUpdate]) -> Record:
    """Figures of a tensor's edit before it is stored; over parts, norms add up and errors are the worst."""
    worst = max(updates, key=lambda update: update.certified_error)
    delta = math.fsum(update.delta_energy for update in updates)
    return {
        "name": step.name,
        "action": "edit",
        "reason": step.reason,
        "rank": max(update.rank for update in updates),
        "certified_error": worst.certified_error,
        "energy_deficit": max(update.energy_deficit for update in updates),
        "criterion": worst.criterion,
        "energy_kept": math.fsum(update.energy_kept * update.delta_energy for update in updates) / delta,
        "delta_norm": math.sqrt(delta),
    }


def _record(step: Step, done: Sequence[tuple[WeightUpdate, Stored, float]]) -> Record:
    """Figures of an edited tensor, those of its storage included."""
    stored = [kept for _, kept, _ in done]
    edit = math.fsum(part.edit_energy for part in stored)
    weight = math.hypot(*(norm for _, _, norm in done))
    return {
        **update_figures(step, [update for update, _, _ in done]),
        "edit_norm": math.sqrt(edit),
        "edit_to_weight": math.sqrt(edit) / weight if weight else None,
        "retention": math.fsum(part.inner for part in stored) / edit if edit else 1.0,
        "noise": math.sqrt(math.fsum(part.noise_energy for part in stored) / edit) if edit else 0.0,
        "noise_spectral": max(part.noise_spectral for part in stored),
        "rounding": "+".join(sorted({part.mode for part in stored})),
        "iterations": max(part.iterations for part in stored),
        "changed": sum(part.changed for part in stored),
    }


def _require_change(record: Record) -> None:
    if record["edit_norm"] > 0 and record["changed"] == 0:
        raise OutputError(
            f"the edit of {record['name']} is lost in rounding: not one entry would change; "
            "use --rounding auto, or --dtype float32"
        )


def copied(reader: Reader, info: TensorInfo, dtype: str) -> Iterator[memoryview]:
    """The bytes of a tensor that is not edited, as stored; cast where the output's dtype differs.

    Raises:
        InputError: A value is NaN or infinite, before or after the cast.
    """
    if dtype != info.dtype:
        source = reader.read(info.name)
        require_finite(source, info.name, "aligned")
        yield as_bytes(cast(source, torch_dtype(dtype), info.name))
        return
    for chunk in reader.raw(info.name):
        if info.is_float:
            require_finite(torch.frombuffer(chunk, dtype=torch_dtype(dtype)), info.name, "aligned")
        yield chunk


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A finite tensor in another dtype, rounded to nearest.

    Raises:
        InputError: A value overflows.
    """
    result = tensor.to(dtype)
    if not bool(torch.isfinite(result).all()):
        raise InputError(
            f"{name} does not fit {str(dtype).removeprefix('torch.')}; use --dtype bfloat16 or keep"
        )
    return result


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in row-major order, without a copy where it is contiguous."""
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
