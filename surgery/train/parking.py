"""Tensors put aside in a file that is mapped into memory, so that they do not count against it while not in use."""

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery.train.spreading import local

_ALIGNED = 64


class Aside:
    """Copies of tensors in a file without a name, which goes with the process whatever ends it.

    Args:
        tensors: What to copy; of those that FSDP cut, this process's part.
        folder: Where there is room for the file; the system's folder for such files by default.

    Attributes:
        copies: The values, on the CPU, in the order of the tensors.
    """

    def __init__(self, tensors: Sequence[Tensor], folder: Path | None = None) -> None:
        parts = [local(tensor) for tensor in tensors]
        starts = [0, *accumulate(-(-part.nbytes // _ALIGNED) * _ALIGNED for part in parts)]
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(starts[-1] or 1)
            mapped = mmap.mmap(file.fileno(), 0)
        self.copies = [
            torch.frombuffer(mapped, dtype=part.dtype, count=part.numel(), offset=start)
            .view(part.shape)
            .copy_(part)
            if part.numel()
            else part.clone()
            for part, start in zip(parts, starts, strict=False)
        ]

    def put_back(self, tensors: Sequence[Tensor]) -> None:
        """Copy the values into these tensors, which are shaped and cut as the first ones were."""
        with torch.no_grad():
            for tensor, copy in zip(tensors, self.copies, strict=True):
                local(tensor).copy_(copy)


@contextmanager
def parked(optimiser: torch.optim.Optimizer, folder: Path | None = None) -> Iterator[None]:
    """The optimiser's state out of memory inside the with-block, and back as it was after it."""
    tensors = [
        value
        for state in optimiser.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim() > 0
    ]
    aside = Aside(tensors, folder)
    sizes = [local(tensor).untyped_storage().nbytes() for tensor in tensors]
    for tensor in tensors:
        local(tensor).untyped_storage().resize_(0)
    try:
        yield
    finally:
        for tensor, size in zip(tensors, sizes, strict=True):
            local(tensor).untyped_storage().resize_(size)
        aside.put_back(tensors)


@contextmanager
def kept(weights: Sequence[nn.Parameter], folder: Path | None = None) -> Iterator[Aside]:
    """Weights that may be moved for long inside the with-block, put back bit by bit after it."""
    aside = Aside(weights, folder)
    try:
        yield aside
    finally:
        aside.put_back(weights)


class Original:
    """The model as it was when a run began: with its adapter off, or with its first weights in place.

    Args:
        model: Made trainable and spread over processes, not yet trained.
        folder: Where its weights are kept, if all are trained.
    """

    def __init__(self, model: nn.Module, folder: Path | None = None) -> None:
        self._model = model
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self._first = None if hasattr(model, "disable_adapter") else Aside(trained, folder)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The model as it was, inside the with-block."""
        if self._first is None:
            with self._model.disable_adapter():  # type: ignore[operator]
                yield
            return
        weights = [weight for weight in self._model.parameters() if weight.requires_grad]
        now = [local(weight.detach()).clone() for weight in weights]
        self._first.put_back(weights)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, now, strict=True):
                    local(weight).copy_(value)
