"""Block Krylov iteration on `delta` and its transpose, one product at a time.

From a random block on the shorter side the iteration multiplies alternately by `delta` and `delta^T`; every
product is made orthonormal against everything its side already holds. The two bases then span the
block Krylov spaces of `delta^T delta` and `delta delta^T` (Golub and Kahan's bidiagonalisation in
blocks; Musco and Musco, NeurIPS 2015, for its accuracy), and every product ever made stays in memory, so that
residuals of approximate singular vectors cost no further pass over `delta`.

Products run in the dtype of `delta`; everything of the size of the Krylov dimension is float64.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.kernels.orthonormalise import orthonormalise, polish

_T = TypeVar("_T")


@dataclass(frozen=True)
class Krylov:
    """The iteration after some number of products; pairs are (starting side, other side).

    `images[s]` holds the products of `bases[s]`, block by block, and together they equal
    `bases[1 - s] @ coefficients[s]` up to roundoff. The basis extended last has no product of its newest block yet.
    """

    delta: Float[Tensor, "batch m n"]
    bases: tuple[Tensor, Tensor]
    images: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    coefficients: tuple[Tensor, Tensor]
    block: int
    passes: int
    starts_right: bool
    generator: torch.Generator

    @property
    def dimension(self) -> int:
        """Columns of the space in which singular vectors are sought."""
        return self.block * len(self.images[self.passes % 2])


@dataclass(frozen=True)
class Ritz:
    """Approximate singular triplets in coordinates of the two bases, all float64.

    The inner basis is the one all of whose products lie in the other, outer basis.
    `leak` holds, per triplet, the residual on the inner side in coordinates of its newest block.
    """

    values: Float[Tensor, "batch l"]
    outer: Float[Tensor, "batch d_outer l"]
    inner: Float[Tensor, "batch d_inner l"]
    leak: Float[Tensor, "batch b l"]


@dataclass(frozen=True)
class Triplets:
    """Approximate singular triplets of `delta` with measured residuals, all float64.

    `inner_residual` is `op^T u - s v` and `outer_residual` is `op v - s u`, where v are the inner vectors, u the
    outer ones and op is `delta` when the inner side is the right one and its transpose otherwise.
    """

    left: Float[Tensor, "batch m l"]
    values: Float[Tensor, "batch l"]
    right: Float[Tensor, "batch n l"]
    inner_residual: Float[Tensor, "batch inner l"]
    outer_residual: Float[Tensor, "batch outer l"]


def start(delta: Float[Tensor, "batch m n"], block: int, generator: torch.Generator) -> Krylov:
    """The iteration before its first product: one random orthonormal block on the shorter side.

    Every matrix of the batch starts from the same block.

    Args:
        delta: Float32 or float64 matrices.
        block: Columns per product, from 1 to min(m, n).
        generator: Source of the random block, on the CPU.
    """
    m, n = delta.shape[-2:]
    starts_right = n <= m
    short, long = min(m, n), max(m, n)
    drawn = torch.randn(short, block, generator=generator, dtype=torch.float64).to(delta)
    nothing = delta.new_zeros(len(delta), short, 0)
    first, _ = orthonormalise(drawn.expand(len(delta), -1, -1), nothing, generator)
    other = delta.new_zeros(len(delta), long, 0)
    none = [first.new_zeros(len(delta), rows, 0, dtype=torch.float64) for rows in (0, block)]
    return Krylov(delta, (first, other), ((), ()), (none[0], none[1]), block, 0, starts_right, generator)


def advance(state: Krylov) -> Krylov:
    """The iteration after one more product."""
    side = state.passes % 2
    newest = state.bases[side][..., -state.block :]
    image = _multiply(state.delta, newest, plain=(side == 0) == state.starts_right)
    columns, coefficients = orthonormalise(image, state.bases[1 - side], state.generator)
    extended = torch.cat([state.bases[1 - side], columns], dim=-1)
    padded = torch.nn.functional.pad(state.coefficients[side], (0, 0, 0, state.block))
    expressed = torch.cat([padded, coefficients], dim=-1)
    return Krylov(
        delta=state.delta,
        bases=_with(state.bases, 1 - side, extended),
        images=_with(state.images, side, (*state.images[side], image)),
        coefficients=_with(state.coefficients, side, expressed),
        block=state.block,
        passes=state.passes + 1,
        starts_right=state.starts_right,
        generator=state.generator,
    )


def ritz(state: Krylov, count: int) -> Ritz:
    """The `count` largest approximate singular triplets (fewer if the space is smaller), after two passes or more."""
    inner = state.passes % 2
    outer, values, rows = torch.linalg.svd(state.coefficients[inner], full_matrices=False)
    outer, values, coordinates = outer[..., :count], values[..., :count], rows[..., :count, :].mT
    leak = state.coefficients[1 - inner][..., -state.block :, :] @ outer
    return Ritz(values, outer, coordinates, leak)


def triplets(state: Krylov, found: Ritz) -> Triplets:
    """Singular vectors and measured residuals of Ritz triplets, from products already made."""
    inner = state.passes % 2
    v, op_v = _pair(state, inner, found.inner)
    u, op_u = _pair(state, 1 - inner, found.outer)
    values = found.values.unsqueeze(-2)
    right, left = (v, u) if (inner == 0) == state.starts_right else (u, v)
    return Triplets(left, found.values, right, op_u - v * values, op_v - u * values)


def _with(pair: tuple[_T, _T], side: int, value: _T) -> tuple[_T, _T]:
    return (value, pair[1]) if side == 0 else (pair[0], value)


def _multiply(delta: Tensor, block: Tensor, *, plain: bool) -> Tensor:
    """`delta @ block` or `delta^T @ block`, both reading `delta` along its rows."""
    return delta @ block if plain else (block.mT.contiguous() @ delta).mT.contiguous()


def _pair(state: Krylov, side: int, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal vectors at `coordinates` of one basis, and their products."""
    vectors = _combine(_blocks(state.bases[side], state.block), coordinates)
    nearest = polish(vectors)
    return vectors @ nearest, _combine(state.images[side], coordinates @ nearest)


def _combine(blocks: tuple[Tensor, ...], coordinates: Tensor) -> Tensor:
    """Columns at `coordinates` of the first blocks, in float64, one block at a time to hold no copy of all."""
    parts = _blocks(coordinates.mT, blocks[0].shape[-1])
    total: Tensor = blocks[0].double() @ parts[0].mT
    for block, part in zip(blocks[1:], parts[1:], strict=False):
        total += block.double() @ part.mT
    return total


def _blocks(columns: Tensor, size: int) -> tuple[Tensor, ...]:
    return tuple(columns[..., begin : begin + size] for begin in range(0, columns.shape[-1], size))
