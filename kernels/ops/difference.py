"""Products with the difference of two weights, which is never stored.

With D = A - B for every pair of a stack:

    right_product(A, B, X) = D X        left_product(A, B, Y) = D^T Y
    gram_product(A, B, X)  = D X, D^T D X        energy(A, B) = sum of D_ij^2

D is taken in float32, which holds the difference of two bfloat16 numbers exactly as long as one is at most 2^15
times the other, and of two float16 numbers up to 2^12 times. Products are accumulated in float32 from float32
factors, never in TF32. If one of the two weights is float64, everything is float64.

The reference needs two tiles of 2^17 entries beside its arguments and results, whatever the size of the weights.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from surgery.errors import UsageError
from surgery.kernels.backend import choose
from surgery.kernels.tiling import Tile, sides, tiles


class Energy(NamedTuple):
    """What the entries of each difference add up to."""

    squares: Float64[Tensor, " batch"]
    """Sum of squares, the squared Frobenius norm."""
    finite: Bool[Tensor, " batch"]
    """No entry is infinite or NaN (of float64 weights also: none is larger than 1e154)."""


def right_product(
    aligned: Float[Tensor, "batch m n"], base: Float[Tensor, "batch m n"], columns: Float[Tensor, "batch n b"]
) -> Float[Tensor, "batch m b"]:
    """`(aligned - base) @ columns` in float32 (float64 if a weight is).

    Raises:
        UsageError: Shapes do not fit, or the backend asked for cannot compute this.
    """
    wide = _checked(aligned, base, columns, inner=2)
    columns = columns.to(wide)
    if choose(aligned, base, columns) == "triton":
        from surgery.kernels import difference_triton

        return difference_triton.right_product(aligned, base, columns)
    out = columns.new_zeros(*aligned.shape[:2], columns.shape[2])
    for (matrices, rows), delta in _differences(aligned, base, wide):
        torch.bmm(delta, columns[matrices], out=out[matrices, rows])
    return out


def left_product(
    aligned: Float[Tensor, "batch m n"], base: Float[Tensor, "batch m n"], columns: Float[Tensor, "batch m b"]
) -> Float[Tensor, "batch n b"]:
    """`(aligned - base)^T @ columns` in float32 (float64 if a weight is).

    Raises:
        UsageError: Shapes do not fit, or the backend asked for cannot compute this.
    """
    wide = _checked(aligned, base, columns, inner=1)
    columns = columns.to(wide)
    if choose(aligned, base, columns) == "triton":
        from surgery.kernels import difference_triton

        return difference_triton.left_product(aligned, base, columns)
    out = _zeros(columns, aligned)
    for (matrices, rows), delta in _differences(aligned, base, wide):
        out[matrices].baddbmm_(columns[matrices, rows].mT, delta)
    return out.mT


def gram_product(
    aligned: Float[Tensor, "batch m n"], base: Float[Tensor, "batch m n"], columns: Float[Tensor, "batch n b"]
) -> tuple[Float[Tensor, "batch m b"], Float[Tensor, "batch n b"]]:
    """`Y = (aligned - base) @ columns` and `(aligned - base)^T @ Y`, for one reading of the two weights.

    Raises:
        UsageError: Shapes do not fit, or the backend asked for cannot compute this.
    """
    wide = _checked(aligned, base, columns, inner=2)
    columns = columns.to(wide)
    if choose(aligned, base, columns) == "triton":
        from surgery.kernels import difference_triton

        return difference_triton.gram_product(aligned, base, columns)
    image = columns.new_zeros(*aligned.shape[:2], columns.shape[2])
    out = _zeros(columns, aligned)
    for (matrices, rows), delta in _differences(aligned, base, wide):
        part = image[matrices, rows]
        torch.bmm(delta, columns[matrices], out=part)
        out[matrices].baddbmm_(part.mT, delta)
    return image, out.mT


def energy(aligned: Float[Tensor, "batch m n"], base: Float[Tensor, "batch m n"]) -> Energy:
    """Sum of squares of each difference, added up in float64, and whether all entries are finite.

    Raises:
        UsageError: Shapes do not fit, or the backend asked for cannot compute this.
    """
    wide = _checked(aligned, base)
    if choose(aligned, base) == "triton":
        from surgery.kernels import difference_triton

        squares = difference_triton.energy(aligned, base)
    else:
        squares = _squares(aligned, base, wide)
    # Squares of finite float32 numbers add up to no more than 1e77 times their count: float64 holds them all.
    return Energy(squares, torch.isfinite(squares))


def _squares(aligned: Tensor, base: Tensor, wide: torch.dtype) -> Tensor:
    """Sums of squares of each difference, float64."""
    squares = torch.zeros(len(aligned), dtype=torch.float64, device=aligned.device)
    double = torch.empty(0, dtype=torch.float64, device=aligned.device)
    for (matrices, _), delta in _differences(aligned, base, wide):
        # The first tile is the largest: later ones fit into its memory.
        double = (
            double if double.numel() >= delta.numel() else delta.new_empty(delta.numel(), dtype=torch.float64)
        )
        entries = double[: delta.numel()].view(delta.shape).copy_(delta)
        squares[matrices] += torch.linalg.vector_norm(entries, dim=(1, 2)).square()
    return squares


def _differences(aligned: Tensor, base: Tensor, wide: torch.dtype) -> Iterator[tuple[Tile, Tensor]]:
    """Every tile of the difference, in one buffer that the next tile overwrites."""
    if not aligned.numel():
        return
    together, rows = sides(aligned.shape)
    buffer = torch.empty(together, rows, aligned.shape[2], dtype=wide, device=aligned.device)
    for at in tiles(aligned.shape):
        ours = aligned[at]
        yield at, buffer[: ours.shape[0], : ours.shape[1]].copy_(ours).sub_(base[at])


def _zeros(columns: Tensor, aligned: Tensor) -> Tensor:
    """Room for a sum of products on the right, one vector a row: those are read along the rows of a tile."""
    return columns.new_zeros(len(aligned), columns.shape[2], aligned.shape[2])


def _checked(aligned: Tensor, base: Tensor, columns: Tensor | None = None, inner: int = 0) -> torch.dtype:
    """The dtype to compute in; refuses what does not fit."""
    if aligned.dim() != 3 or aligned.shape != base.shape:
        raise UsageError(
            f"the weights have shapes {tuple(aligned.shape)} and {tuple(base.shape)}; two equal stacks "
            "(batch, m, n) are needed. Use unsqueeze(0) for a single matrix."
        )
    wanted = (len(aligned), aligned.shape[inner])
    if columns is not None and (columns.dim() != 3 or columns.shape[:2] != wanted):
        raise UsageError(
            f"the columns have shape {tuple(columns.shape)}; ({wanted[0]}, {wanted[1]}, b) is needed "
            f"beside weights of shape {tuple(aligned.shape)}. Give one stack of columns for every pair."
        )
    for tensor in (aligned, base) if columns is None else (aligned, base, columns):
        if not tensor.is_floating_point():
            raise UsageError(f"a tensor is {tensor.dtype}; a floating-point one is needed. Decode it first.")
    return torch.float64 if torch.float64 in (aligned.dtype, base.dtype) else torch.float32
