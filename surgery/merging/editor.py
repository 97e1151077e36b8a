"""One tensor of a merged model: the model's own plus what adapters add, stored with one rounding."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from surgery.checkpoint.dtypes import torch_dtype
from surgery.checkpoint.reader import Reader
from surgery.editing import (
    AbstractEditor,
    Edited,
    Record,
    cast,
    compute_device,
    require_change,
    require_finite,
    storage_figures,
)
from surgery.errors import InputError
from surgery.merging.deltas import Deltas, rank_of
from surgery.merging.landing import Added, Lora, Part, Replaced
from surgery.options import Options
from surgery.plan import Step
from surgery.rounding import Stored, store
from surgery.spectral import Factors

_WIDE = ("F32", "F64")


def held_low(parts: Sequence[Part], shape: Sequence[int], dtype: str) -> bool:
    """Whether a delta is stored from its factors: into 16 bits, where what it loses is made up for along them.

    Into wider dtypes it is added as PEFT adds it, entry by entry, so that the sums are the same.
    """
    return dtype not in _WIDE and len(shape) >= 2 and rank_of(parts, shape) is not None


def workspace(parts: Sequence[Part], shape: Sequence[int], dtype: str) -> int:
    """Bytes that a delta takes beyond one float32 tensor of the weight's shape."""
    if held_low(parts, shape, dtype):
        return 0
    moved = len(parts) > 1 or any(isinstance(part, Lora) and part.magnitude for part in parts)
    return math.prod(shape) * (16 if moved else 0)


class MergeEditor(AbstractEditor):
    """Adds deltas to tensors of a model.

    A vector of which training changed too little for its dtype (norms, where all weights are trained) stays as it is
    and is named among the unchanged: there are no factors along which what is lost could be made up for.

    Args:
        parts: What each edited tensor gets, by its name.
        options: How to round, where to compute, and the seed.
        model: Reads the model.
        adapters: Reads the tensors of all adapters.
    """

    def __init__(
        self, parts: Mapping[str, tuple[Part, ...]], options: Options, model: Reader, adapters: Reader
    ) -> None:
        self._parts, self._options, self._model = parts, options, model
        self._device = compute_device(options)
        self._deltas = Deltas(adapters, self._device)

    def anchor(self, step: Step) -> Tensor:
        """The model's own tensor."""
        tensor = self._model.read(step.name)
        require_finite(tensor, step.name, "model's")
        return tensor

    def require_finite_base(self, step: Step) -> None:
        """Nothing is compared: what is not edited is the model's own."""

    def edit(self, step: Step) -> Edited:
        """The merged tensor in the output's dtype, with its record.

        Raises:
            InputError: A value is NaN or infinite, or the result does not fit the dtype.
            OutputError: The delta is not zero and yet not a byte would change.
        """
        anchor, parts = self.anchor(step).to(self._device), self._parts[step.name]
        shape = anchor.shape
        # Storing knows matrices and stacks of them; a vector is one row.
        anchor = anchor if anchor.dim() in (2, 3) else anchor.reshape(1, -1)
        if isinstance(parts[0], Replaced) and len(parts) == 1:
            stored = _replaced(anchor, self._deltas.replacement(parts[0]), torch_dtype(step.dtype), step.name)
        else:
            stored = self._added(anchor, parts, step)
        if stored is None:
            return _unchanged(step, "its delta is zero")
        record: Record = {
            "name": step.name,
            "action": "edit",
            "reason": step.reason,
            "rank": step.rank,
            **storage_figures([stored]),
        }
        if not record["changed"] and max(shape) == math.prod(shape) and isinstance(parts[0], Added):
            return _unchanged(step, f"its delta is below half the spacing of {step.dtype} at every value")
        require_change(record)
        return Edited(stored.weight.reshape(shape).cpu(), record)

    def _added(self, anchor: Tensor, parts: Sequence[Part], step: Step) -> Stored | None:
        edit = self._delta(anchor, parts, step)
        if not bool((edit.values if isinstance(edit, Factors) else edit).any()):
            return None
        if isinstance(edit, Tensor):
            edit = edit.reshape(anchor.shape)
        mode, seed = self._options.rounding, self._options.seed
        return store(anchor, edit, torch_dtype(step.dtype), mode=mode, seed=seed, name=step.name)

    def _delta(self, anchor: Tensor, parts: Sequence[Part], step: Step) -> Factors | Tensor:
        """What is added to a tensor."""
        start, parts = self._start(anchor, parts)
        plain = [part for part in parts if isinstance(part, Lora)]
        if start is None and held_low(parts, step.shape, step.dtype):
            return self._deltas.low_rank(plain, step.shape)
        if start is None and len(parts) == 1 and not (plain and plain[0].magnitude):
            return self._deltas.dense(parts[0], step.shape)
        moved = self._deltas.moved(anchor.float() if start is None else start, parts, step.shape)
        if not bool(moved.isfinite().all()):
            raise InputError(
                f"{step.name} does not come out finite with {parts[0].label}: too large, or DoRA of an output whose "
                "weights are all zero; merge it with PEFT"
            )
        # In float64 the difference of two float32 numbers is exact, so that their sum is the new value again.
        return moved.double() - anchor.double() if step.dtype in _WIDE else moved - anchor.float()

    def _start(self, anchor: Tensor, parts: Sequence[Part]) -> tuple[Tensor | None, Sequence[Part]]:
        """What an adapter begins from that saved a layer with its factors, None for the model's own; and the rest."""
        if not isinstance(parts[0], Replaced):
            return None, parts
        saved = self._deltas.replacement(parts[0]).float().reshape(anchor.shape)
        return (None if torch.equal(saved, anchor.float()) else saved), parts[1:]


def _unchanged(step: Step, reason: str) -> Edited:
    return Edited(None, {"name": step.name, "action": "unchanged", "reason": reason})


def _replaced(anchor: Tensor, new: Tensor, dtype: torch.dtype, name: str) -> Stored | None:
    """A new value as stored, with the figures of the edit that it amounts to; None where it is the old one."""
    new = new.reshape(anchor.shape)
    weight, before, wanted = cast(new, dtype, name), anchor.double(), new.double()
    edit, lost = wanted - before, weight.double() - wanted
    energy, noise = float(edit.square().sum()), float(lost.square().sum())
    if not energy:
        return None
    inner = energy + float((edit * lost).sum())
    return Stored(
        weight=weight,
        mode="nearest",
        retention=inner / energy,
        noise=math.sqrt(noise / energy),
        # One norm stands for both: nothing is decomposed here.
        noise_spectral=math.sqrt(noise / energy),
        iterations=0,
        inner=inner,
        edit_energy=energy,
        noise_energy=noise,
        anchor_energy=float(before.square().sum()),
        changed=int((weight != cast(anchor, dtype, name)).sum()),
    )
