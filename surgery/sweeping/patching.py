"""A loaded model with the weights that `surgery lox` would store, and after that bit for bit as it was.

Each tensor goes through the same editor as in a run that writes a model: read from both checkpoints, the edit added,
and rounded once to the dtype of the files, in the mode asked for. Only the decomposition is taken from `factors`.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery import provenance
from surgery.checkpoint.reader import Reader
from surgery.editing import Edited, Editor, Record
from surgery.edits import in_work_order
from surgery.errors import InputError, UsageError
from surgery.hub import fetch
from surgery.job import PairJob, prepare
from surgery.methods.lox import LoX
from surgery.options import Options
from surgery.plan import Step
from surgery.spectral import Factors
from surgery.sweeping import grid
from surgery.sweeping.factors import Cut, factored
from surgery.sweeping.places import locate, view
from surgery.train import parking


class Patcher:
    """Edits of one pair on one loaded model.

    Args:
        job: Of the largest rank there will be, alpha 1.
        model: Loaded from the aligned checkpoint.
        folder: Where factors are kept.

    Raises:
        InputError: An edited tensor cannot be found in the model, or holds NaN or infinity.
    """

    def __init__(self, job: PairJob, model: nn.Module, folder: Path | None = None) -> None:
        if not isinstance(job.method, LoX):
            raise UsageError(f"a sweep edits by LoX, not by {job.method.title}")
        self.model = model
        self._job, self._method = job, job.method
        self._places = locate(model, job.aligned, job.plan.steps)
        with _one_thread():
            self._factored = factored(job, folder) if isinstance(self._method.rank, int) else {}

    @contextmanager
    def patched(self, params: grid.Params) -> Iterator[dict[str, Any]]:
        """The model edited as a trial says inside the with-block, and as it was after it, whatever happens there.

        Yields:
            Figures over all edited tensors: what was kept of the update, and what rounding left of the edit.

        Raises:
            InputError: Alignment changed no selected tensor, or the result does not fit the dtype.
            OutputError: The edit is not zero and yet not an entry of a tensor would change.
            UsageError: LoX does not allow these parameters, or the rank is above the one decomposed at.
        """
        method = self._cut(params)
        with parking.kept([self._weights()[name] for name in self._parameters()]):
            yield provenance.totals(self._patch(method))

    def direction(self, rank: int | str) -> dict[str, Tensor]:
        """`P_k(W_aligned - W_base)` in float32, before any rounding, by the names of the model's parameters."""
        method, weights = self._cut({"rank": rank, "alpha": 1.0, "anchor": "aligned"}), self._weights()
        first = {id(weight): name for name, weight in self.model.named_parameters()}
        found = {name: torch.zeros_like(weights[name], dtype=torch.float32) for name in self._parameters()}
        with _one_thread(), self._readers() as (aligned, base):
            editor = Editor(method, self._job.options, aligned, base)
            for step in self._job.plan.edits:
                whole = view(found, self._places[step.name], step.shape)
                for number, update in enumerate(editor.updates(step)):
                    part = step.slices[number].of(whole) if step.slices else whole
                    if update is not None:
                        part.copy_(update.edit.dense() if isinstance(update.edit, Factors) else update.edit)
        return {first[id(weights[name])]: direction for name, direction in found.items()}

    def _cut(self, params: grid.Params) -> Cut:
        asked = grid.lox(self._method, params)
        largest = self._method.rank if isinstance(self._method.rank, int) else 0
        if isinstance(asked.rank, int) and asked.rank > largest:
            raise UsageError(f"rank is {asked.rank}, and this sweep was decomposed at rank {largest}")
        return Cut(**vars(asked), factored=self._factored)

    def _parameters(self) -> list[str]:
        return list(dict.fromkeys(place.parameter for place in self._places.values()))

    def _weights(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    @contextmanager
    def _readers(self) -> Iterator[tuple[Reader, Reader]]:
        with Reader(self._job.aligned) as aligned, Reader(self._job.base) as base:
            yield aligned, base

    def _patch(self, method: Cut) -> list[Record]:
        """Put the edited tensors in their places; those that alignment left unchanged are there already."""
        weights, job = self._weights(), self._job
        records: list[Record] = []
        with _one_thread(), self._readers() as (aligned, base):
            editor = Editor(method, job.options, aligned, base)

            def edit(step: Step) -> Edited | None:
                return editor.edit(step) if self._chosen(method, step) else None

            with closing(in_work_order(job, job.aligned.shards, edit)) as edits:
                for step, edited in zip(job.plan.edits, edits, strict=True):
                    if edited is None:
                        continue
                    records.append(edited.record)
                    if edited.tensor is not None:
                        view(weights, self._places[step.name], step.shape).copy_(edited.tensor)
        if not any(record["action"] == "edit" for record in records):
            raise InputError(job.nothing_changed())
        return records

    def _chosen(self, method: LoX, step: Step) -> bool:
        """Whether a trial edits a tensor that the sweep decomposed; scales of fp8 go with their weight."""
        name = (step.weight or step).name
        return method.choose(self._job.aligned.tensors[name], self._job.aligned.config).edit


def open_patcher(
    method: LoX,
    model: nn.Module,
    *,
    base: str | Path,
    aligned: str | Path,
    output: Path,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Patcher:
    """Plan as `surgery lox` does, decompose, and be ready to patch.

    Args:
        method: Its rank is the largest there will be (`full` if there is no other); alpha and anchor do not matter.
        model: Loaded from `aligned`.
        base: The checkpoint before alignment.
        aligned: The aligned checkpoint.
        output: The sweep's folder, where factors are kept; it may not lie in a checkpoint.
        options: How to run; every tensor keeps its dtype.

    Raises:
        SurgeryError: Anything that would keep `surgery lox` from succeeding, or a tensor has no place in the model.
    """
    if options.as_lora or options.stream or options.dtype != "keep":
        raise UsageError(
            "a sweep measures the model as it is stored; leave out --as-lora, --stream and --dtype"
        )
    if method.rank == "auto":
        raise UsageError("rank is auto; a sweep needs numbers, as in --rank 1,3,6,12")
    with _one_thread():
        job = prepare(
            replace(method, alpha=1.0, anchor="aligned"),
            base=base,
            model=aligned,
            output=output,
            options=options,
        )
    for source in job.sources.values():
        fetch(source)
    return Patcher(job, model, output)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A block in which torch computes as in a run that writes a model, so that no bit depends on the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
