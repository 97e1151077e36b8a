"""Every edited tensor of a pair decomposed once, at the largest rank of a sweep; smaller ranks are its leading part.

The leading k of K triplets are P_k(delta) as far as the certificate of K goes: where a matrix is decomposed in full
(a shorter side up to 128) they are those of a separate run at rank k bit for bit; where it is iterated, the two runs
stop at different Krylov dimensions and differ by no more than their tolerances, 1e-3 of ||P_k|| and mostly far less,
which rounding turns into another neighbour on the grid of the dtype for 1e-5 to 1e-3 of the entries.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint.reader import Reader
from surgery.editing import Editor
from surgery.edits import in_work_order
from surgery.job import PairJob
from surgery.methods.base import WeightUpdate
from surgery.methods.lox import LoX
from surgery.plan import Step
from surgery.spectral import Factors

_PARTS = ("left", "values", "right")
_TURNED = "left is turned"


@dataclass(frozen=True)
class Cut(LoX):
    """LoX by factors that were made before, cut to its rank; `auto` and `full` need none.

    Attributes:
        factored: The update of every part of every edited tensor at alpha 1, by the part's name.
    """

    factored: Mapping[str, WeightUpdate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Nothing is to be checked: it has the fields of a LoX."""

    def update(self, aligned: Tensor, base: Tensor, *, name: str, seed: int) -> WeightUpdate:
        """`alpha * P_k(aligned - base)` from what is known of it."""
        if not isinstance(self.rank, int):
            return super().update(aligned, base, name=name, seed=seed)
        return _cut(self.factored[name], self.rank, self.alpha, aligned.device)


def _cut(whole: WeightUpdate, rank: int, alpha: float, device: torch.device) -> WeightUpdate:
    """The leading part of an update; what certifies it is the certificate of the whole."""
    factors = _factors(whole)
    left, values = _leading(factors.left, rank), factors.values[..., :rank]
    held = float(values.double().square().sum()) / whole.delta_energy
    right = factors.right[..., :rank, :].contiguous()
    edit = Factors(*(part.to(device) for part in (left, values * alpha, right)))
    return replace(whole, edit=edit, rank=int((values != 0).sum(-1).max()), energy_kept=min(held, 1.0))


def _leading(left: Tensor, rank: int) -> Tensor:
    """The first columns, in memory laid out as all of them are: products of other layouts may differ in a bit."""
    if left.is_contiguous():
        return left[..., :rank].contiguous()
    return left.mT[..., :rank, :].contiguous().mT


def _factors(update: WeightUpdate) -> Factors:
    if isinstance(update.edit, Tensor):
        raise TypeError("an update of full rank has no factors")
    return update.edit


def factored(job: PairJob, folder: Path | None = None) -> dict[str, WeightUpdate]:
    """The update of every part of every edited tensor that alignment changed, by the part's name, on the CPU.

    Args:
        job: Its method has the rank to decompose at, and alpha 1.
        folder: Where factors are kept, so that another run with the same inputs and rank makes none.

    Raises:
        InputError: A value is NaN or infinite.
    """
    if folder is None:
        return _made(job)
    identity = identity_of(job)
    file = folder / f"factors-r{getattr(job.method, 'rank', 0)}.safetensors"
    if (known := _load(file, identity)) is not None:
        return known
    made = _made(job)
    _save(file, identity, made)
    return made


def _made(job: PairJob) -> dict[str, WeightUpdate]:
    found: dict[str, WeightUpdate] = {}
    with Reader(job.aligned) as aligned, Reader(job.base) as base:
        editor = Editor(job.method, job.options, aligned, base)
        with closing(in_work_order(job, job.aligned.shards, editor.updates)) as updates:
            for step, parts in zip(job.plan.edits, updates, strict=True):
                found |= {
                    name: replace(update, edit=_on_cpu(_factors(update)))
                    for name, update in zip(part_names(step), parts, strict=True)
                    if update is not None
                }
    return found


def part_names(step: Step) -> list[str]:
    """The names by which an editor knows the parts of a tensor."""
    return [f"{step.name}[{number}]" for number in range(len(step.slices))] or [step.name]


def _on_cpu(factors: Factors) -> Factors:
    return Factors(*(getattr(factors, part).cpu() for part in _PARTS))


def identity_of(job: PairJob) -> str:
    """What the factors depend on; how they are rounded later is no part of it."""
    known = job.fingerprint()
    known["options"] = {key: value for key, value in known["options"].items() if key != "rounding"}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _save(file: Path, identity: str, made: Mapping[str, WeightUpdate]) -> None:
    """Write the factors, whole or not at all."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name, update in made.items():
        factors = _factors(update)
        tensors |= {f"{name}/{part}": getattr(factors, part) for part in _PARTS}
        figures[name] = {key: value for key, value in vars(update).items() if key != "edit"}
        # Files hold rows: left factors that lie in memory column by column are turned.
        if not factors.left.is_contiguous():
            tensors[f"{name}/left"] = factors.left.mT.contiguous()
            figures[name][_TURNED] = True
    file.parent.mkdir(parents=True, exist_ok=True)
    building = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        building.touch()
        mode = building.stat().st_mode
        save_file(tensors, building, {"identity": identity, "figures": json.dumps(figures)})
        # safetensors leaves files that only their owner may read, whatever the umask says.
        building.chmod(mode)
        building.replace(file)
    finally:
        building.unlink(missing_ok=True)


def _load(file: Path, identity: str) -> dict[str, WeightUpdate] | None:
    """The factors of a file; None where it is missing, damaged, or of something else."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, WeightUpdate] = {}
    try:
        with safe_open(file, "pt") as opened:
            told: dict[str, Any] = opened.metadata() or {}
            if told.get("identity") != identity:
                return None
            for name, figure in json.loads(told["figures"]).items():
                left, values, right = (opened.get_tensor(f"{name}/{part}") for part in _PARTS)
                left = left.mT if figure.pop(_TURNED, False) else left
                found[name] = WeightUpdate(Factors(left, values, right), **figure)
    except (OSError, SafetensorError):
        return None
    return found
