"""Block Krylov iteration on a matrix and its transpose, one product at a time.

From a random block on the right the iteration multiplies alternately by the matrix A and its transpose; every
product is made orthonormal against everything its side already holds. The two bases then span the
block Krylov spaces of `A^T A` and `A A^T` (Golub and Kahan's bidiagonalisation in
blocks; Musco and Musco, NeurIPS 2015, for its accuracy), and every product ever made stays in memory, so that
residuals of approximate singular vectors cost no further pass over the matrix.

A pass over a large matrix costs its reading, so two products are made of each: with `Y = A Q` for the newest block
Q also `Z = A^T Y`, tile by tile. Once Y is written in the other basis, `Y = P_old C + P_new R`, the next product
follows without the matrix: `A^T P_new = (Z - A^T P_old C) R^-1`. Roundoff grows by the condition of R on the way;
it is measured (`amplification`), and where it would matter the product is made from the matrix after all.

Products run in the dtype of the matrix; everything of the size of the Krylov dimension is float64. Bases and
products are held transposed, one vector a row, so that a basis grows in place.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from surgery.kernels import difference
from surgery.kernels.orthonormalise import orthonormalise, polish

# Rows of a basis taken to float64 at once.
_WIDE_ROWS = 64
# Entries of a matrix that stay in a core's cache between two products, and of the tile that does of a larger one.
_CACHED, _TILE = 1 << 18, 1 << 17


@runtime_checkable
class Operator(Protocol):
    """A batch of (m, n) matrices known by its products; `rows` holds vectors as rows."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    def times(self, rows: Float[Tensor, "batch b n"]) -> Float[Tensor, "batch b m"]:
        """`(matrix @ rows^T)^T`."""

    def transposed_times(self, rows: Float[Tensor, "batch b m"]) -> Float[Tensor, "batch b n"]:
        """`(matrix^T @ rows^T)^T`."""

    def both(
        self, rows: Float[Tensor, "batch b n"]
    ) -> tuple[Float[Tensor, "batch b m"], Float[Tensor, "batch b n"]]:
        """`times(rows)` and `transposed_times` of that, for the price of reading the matrix once."""


class Stored:
    """Matrices held in memory."""

    def __init__(self, delta: Float[Tensor, "batch m n"]) -> None:
        self._delta = delta
        batch, m, n = delta.shape
        self.shape, self.dtype, self.device = (batch, m, n), delta.dtype, delta.device

    def times(self, rows: Tensor) -> Tensor:
        """`(matrix @ rows^T)^T`; both products read the matrix along its rows."""
        return torch.bmm(self._delta, rows.mT.contiguous()).mT.contiguous()

    def transposed_times(self, rows: Tensor) -> Tensor:
        """`(matrix^T @ rows^T)^T`."""
        return torch.bmm(rows, self._delta)

    def both(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`times(rows)` and `transposed_times` of that, for the price of reading the matrix once."""
        batch, m, n = self.shape
        if m * n <= _CACHED:
            image = self.times(rows)
            return image, self.transposed_times(image)
        image = rows.new_empty(batch, m, rows.shape[1])
        product = torch.zeros_like(rows)
        height = max(1, _TILE // n)
        for matrix, vectors, out, total in zip(self._delta, rows, image, product, strict=True):
            columns = vectors.T.contiguous()
            for begin in range(0, m, height):
                tile, part = matrix[begin : begin + height], out[begin : begin + height]
                torch.mm(tile, columns, out=part)
                total.addmm_(part.T, tile)
        return image.mT.contiguous(), product


class Unstored:
    """Differences of two weights that are formed tile by tile in each product (`surgery.kernels.difference`)."""

    def __init__(self, aligned: Float[Tensor, "batch m n"], base: Float[Tensor, "batch m n"]) -> None:
        self._weights = aligned, base
        batch, m, n = aligned.shape
        self.shape, self.device = (batch, m, n), aligned.device
        self.dtype = torch.float64 if torch.float64 in (aligned.dtype, base.dtype) else torch.float32

    def times(self, rows: Tensor) -> Tensor:
        """`(matrix @ rows^T)^T`."""
        return difference.right_product(*self._weights, rows.mT).mT.contiguous()

    def transposed_times(self, rows: Tensor) -> Tensor:
        """`(matrix^T @ rows^T)^T`."""
        return difference.left_product(*self._weights, rows.mT).mT.contiguous()

    def both(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`times(rows)` and `transposed_times` of that, for the price of reading the weights once."""
        image, product = difference.gram_product(*self._weights, rows.mT)
        return image.mT.contiguous(), product.mT.contiguous()


@dataclass(frozen=True)
class Ritz:
    """Approximate singular triplets in coordinates of the two bases, all float64.

    The inner basis is the one all of whose products lie in the other, outer basis; it is the right one after an
    even number of products.
    `leak` holds, per triplet, the residual on the inner side in coordinates of its newest block.
    """

    values: Float64[Tensor, "batch l"]
    outer: Float64[Tensor, "batch d_outer l"]
    inner: Float64[Tensor, "batch d_inner l"]
    leak: Float64[Tensor, "batch b l"]


@dataclass(frozen=True)
class Triplets:
    """Approximate singular triplets with measured residuals, all float64, one vector a row.

    `inner_residual` is `op^T u - s v` and `outer_residual` is `op v - s u`, where v are the inner vectors, u the
    outer ones and op is the matrix when the inner side is the right one and its transpose otherwise.
    """

    left: Float64[Tensor, "batch l m"]
    values: Float64[Tensor, "batch l"]
    right: Float64[Tensor, "batch l n"]
    inner_residual: Float64[Tensor, "batch l inner"]
    outer_residual: Float64[Tensor, "batch l outer"]


class _Rows:
    """Rows that are added to in place: a buffer that doubles when it is full."""

    def __init__(self, batch: int, width: int, like: Operator, capacity: int) -> None:
        self._buffer = torch.empty(batch, capacity, width, dtype=like.dtype, device=like.device)
        self.count = 0

    @property
    def filled(self) -> Tensor:
        return self._buffer[:, : self.count]

    def append(self, rows: Tensor) -> None:
        batch, capacity, width = self._buffer.shape
        total = self.count + rows.shape[-2]
        if total > capacity:
            grown = self._buffer.new_empty(batch, max(2 * capacity, total), width)
            grown[:, : self.count] = self.filled
            self._buffer = grown
        self._buffer[:, self.count : total] = rows
        self.count = total


class Krylov:
    """The iteration; side 0 is the right one, where it starts, and 1 the left one.

    `images[s]` holds the products of `bases[s]`; as columns they equal `bases[1 - s]^T @ coefficients[s]` up
    to roundoff. The basis extended last has no product of its newest block yet.

    Attributes:
        block: Vectors per product.
        passes: Products made.
        amplification: How many times larger than that of a product from the matrix the roundoff of the images may be.
    """

    def __init__(
        self, operator: Operator, block: int, generator: torch.Generator, *, most: float = 1.0
    ) -> None:
        """The iteration before its first product: one random orthonormal block, the same for the whole batch.

        Args:
            operator: Float32 or float64 matrices.
            block: Vectors per product, from 1 to min(m, n).
            generator: Source of the random block, on the CPU.
            most: The largest `amplification` to accept; 1 makes every product from the matrix.
        """
        batch, m, n = operator.shape
        self.block, self.passes, self.amplification = block, 0, 1.0
        self._operator, self._generator, self._most = operator, generator, most
        self._bases = tuple(_Rows(batch, width, operator, 8 * block) for width in (n, m))
        self._images = tuple(_Rows(batch, width, operator, 8 * block) for width in (m, n))
        drawn = torch.randn(block, n, generator=generator)
        drawn = drawn.to(operator.device, operator.dtype).expand(batch, -1, -1)
        first, _ = orthonormalise(drawn, self._bases[0].filled, generator)
        self._bases[0].append(first)
        nothing = torch.zeros(batch, 0, 0, dtype=torch.float64, device=operator.device)
        self._coefficients = [nothing, nothing.new_zeros(batch, block, 0)]
        self._ahead: Tensor | None = None
        # Roundoff of the newest left image in units of a product's, and what the next step makes of it at a guess.
        self._grown, self._rate = 1.0, 1.0

    @property
    def dimension(self) -> int:
        """Vectors in the space in which singular vectors are sought."""
        return self._images[self.passes % 2].count

    def advance(self) -> None:
        """Make one more product."""
        side = self.passes % 2
        image = self._from_the_right() if side == 0 else self._from_the_left()
        rows, coefficients = orthonormalise(image, self._bases[1 - side].filled, self._generator)
        self._images[side].append(image)
        self._bases[1 - side].append(rows)
        padded = torch.nn.functional.pad(self._coefficients[side], (0, 0, 0, self.block))
        self._coefficients[side] = torch.cat([padded, coefficients], dim=-1)
        self.passes += 1

    def _from_the_right(self) -> Tensor:
        """The product of the newest right block, and ahead of its time what the next one will be made of."""
        newest = self._bases[0].filled[:, -self.block :]
        if self._rate * (1.0 + self._grown) > self._most:
            self._grown = 1.0
            return self._operator.times(newest)
        image, self._ahead = self._operator.both(newest)
        return image

    def _from_the_left(self) -> Tensor:
        """The product of the newest left block: from what was made ahead, or from the matrix."""
        newest = self._bases[1].filled[:, -self.block :]
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._operator.transposed_times(newest)
        expressed = self._coefficients[0][..., -self.block :]
        old, new = expressed[:, : -self.block], expressed[:, -self.block :]
        inverse, failed = torch.linalg.inv_ex(new)
        # Roundoff of Z is that of a product times the length of Y; that of the old products, which grew before,
        # enters with the size of C. Both are per column, on the average over a block.
        entering = torch.linalg.matrix_norm(expressed) + self._grown * torch.linalg.matrix_norm(old)
        growth = (
            float((entering * torch.linalg.matrix_norm(inverse)).nan_to_num(torch.inf).amax()) / self.block
        )
        self._rate = growth / (1.0 + self._grown)
        if bool(failed.any()) or growth > self._most:
            self._grown = 1.0
            return self._operator.transposed_times(newest)
        self._grown = growth
        self.amplification = max(self.amplification, growth)
        known = self._images[1].filled
        rest = torch.baddbmm(ahead, old.mT.to(ahead.dtype), known, alpha=-1) if known.shape[1] else ahead
        return torch.bmm(inverse.mT.to(ahead.dtype), rest)

    def ritz(self, count: int) -> Ritz:
        """The `count` largest approximate triplets (fewer if the space is smaller), after two products or more."""
        inner = self.passes % 2
        outer, values, rows = torch.linalg.svd(self._coefficients[inner], full_matrices=False)
        outer, values, coordinates = outer[..., :count], values[..., :count], rows[..., :count, :].mT
        leak = self._coefficients[1 - inner][..., -self.block :, :] @ outer
        return Ritz(values, outer, coordinates, leak)

    def triplets(self, found: Ritz) -> Triplets:
        """Singular vectors and measured residuals of Ritz triplets, from products already made."""
        inner = self.passes % 2
        v, op_v = self._pair(inner, found.inner)
        u, op_u = self._pair(1 - inner, found.outer)
        values = found.values.unsqueeze(-1)
        right, left = (v, u) if inner == 0 else (u, v)
        return Triplets(left, found.values, right, op_u - v * values, op_v - u * values)

    def _pair(self, side: int, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Orthonormal vectors at `coordinates` of one basis, and their products."""
        vectors = _combine(self._bases[side].filled, coordinates)
        nearest = polish(vectors)
        return nearest @ vectors, _combine(self._images[side].filled, coordinates @ nearest)


def _combine(rows: Tensor, coordinates: Tensor) -> Tensor:
    """Vectors at `coordinates` of the first rows, in float64; few rows at a time, to hold no wide copy of all."""
    weights = coordinates.mT
    total = torch.zeros(len(rows), weights.shape[1], rows.shape[-1], dtype=torch.float64, device=rows.device)
    for begin in range(0, weights.shape[-1], _WIDE_ROWS):
        part = weights[..., begin : begin + _WIDE_ROWS]
        total = torch.baddbmm(total, part, rows[:, begin : begin + part.shape[-1]].double())
    return total
