"""Rounding values to a coarser dtype, once: to nearest, or up with probability equal to the fraction."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from surgery.kernels import philox

Rounder = Callable[[Tensor, torch.dtype, int], Tensor]
"""(values, dtype, flat index of the first) -> what a cast to `dtype` makes the rounded values."""

GRID = {torch.bfloat16: (8, -133), torch.float16: (11, -24), torch.float32: (24, -149)}
"""Bits of the significand with the hidden one, and the exponent of the smallest subnormal."""


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to add in: float32 for 16-bit dtypes alone, float64 with anything wider."""
    return torch.float64 if any(dtype.itemsize > 2 for dtype in dtypes) else torch.float32


def nearest(values: Float[Tensor, "*shape"], dtype: torch.dtype, start: int = 0) -> Float[Tensor, "*shape"]:
    """`values` rounded once to `dtype`, ties to even; overflow gives infinity."""
    return to_nearest(values, dtype, start).to(dtype)


def to_nearest(
    values: Float[Tensor, "*shape"], dtype: torch.dtype, start: int = 0
) -> Float[Tensor, "*shape"]:
    """What a cast to `dtype` rounds as it would round `values` exactly; `values` themselves if possible."""
    del start
    return _to_odd(values) if values.dtype == torch.float64 and dtype.itemsize == 2 else values


@dataclass(frozen=True)
class Stochastic:
    """A rounding that goes up with probability equal to the fraction passed, with the bits of (`words`, flat index).

    Unbiased to 2**-32 of a step, subnormals included; values on the grid of `dtype` stay, as all do for float64.
    """

    words: tuple[int, int]

    def __call__(self, values: Tensor, dtype: torch.dtype, start: int) -> Tensor:
        """`values` in `dtype`; `start` is the flat index of the first."""
        if dtype == torch.float64:
            return values.to(dtype)
        significand, smallest = GRID[dtype]
        values = values.double()
        exponent = ((values.view(torch.int64) >> 52) & 0x7FF) - (1022 + significand)
        quantum = ((exponent.clamp_(min=smallest) + 1023) << 52).view(torch.float64)
        steps = values / quantum
        below = steps.floor()
        drawn = philox.uniform(start, values.numel(), self.words).to(values.device)
        up = drawn.view_as(values) < steps - below
        # `where`, not a sum: -0.0 + 0.0 would lose the sign.
        return (torch.where(up, below + 1, below) * quantum).to(dtype)


def _to_odd(values: Float64[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """float32 with the last bit set where inexact: rounding that again gives what one rounding would.

    torch casts float64 to 16 bits by way of a *nearest* float32, which rounds twice and moves some ties.
    Boldo, Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.
    """
    near = values.float()
    bits = near.view(torch.int32)
    bits = torch.where(near.abs() > values.abs(), bits - 1, bits)
    return torch.where(near != values, bits | 1, bits).view(torch.float32)
