"""Inputs with two labels each: that of the desired task and that of the harmful one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from surgery.errors import InputError


@dataclass(frozen=True)
class Examples:
    """Rows of one kind of input.

    Attributes:
        inputs: What the encoder takes.
        desired: Classes of the desired task.
        harmful: Classes of the harmful task.
    """

    inputs: Shaped[Tensor, "rows ..."]
    desired: Int[Tensor, " rows"]
    harmful: Int[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: slice | Tensor) -> "Examples":
        return Examples(self.inputs[rows], self.desired[rows], self.harmful[rows])

    def draw(self, count: int, source: torch.Generator) -> "Examples":
        """Rows of these, none twice.

        Raises:
            InputError: There are fewer.
        """
        if count > len(self):
            raise InputError(f"{count} examples are to be drawn from {len(self)}; give more or draw fewer")
        return self[torch.randperm(len(self), generator=source)[:count].to(self.inputs.device)]


Draw = Callable[[int, torch.Generator], Examples]
"""So many examples, drawn from this source of chance."""
