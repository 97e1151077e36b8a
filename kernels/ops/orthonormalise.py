"""Orthonormal blocks against a growing basis; blocks and bases are held transposed, one vector a row.

Block classical Gram-Schmidt, applied twice (Giraud, Langou, Rozloznik, 2005: twice is enough). Each block is made
orthonormal through the Cholesky factor of its Gram matrix, and where that is near singular through the eigenvectors
(SVQB: Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002). The Gram matrix and its factors are float64, so that
one block of float32 columns survives condition numbers up to 1e6 and needs no factorisation of a tall matrix.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# A column this much smaller than the block it came from is the roundoff of the product that made it.
_DEAD = {torch.float32: 1e-6, torch.float64: 1e-7}
# Least ratio of squared pivots at which a Cholesky factor is as good as eigenvectors.
_HEALTHY = 1e-8


def orthonormalise(
    block: Float[Tensor, "batch b m"], basis: Float[Tensor, "batch d m"], generator: torch.Generator
) -> tuple[Float[Tensor, "batch b m"], Float64[Tensor, "batch rows b"]]:
    """Orthonormal rows that continue `basis`, and the coefficients of `block` in both.

    `block^T = concat(basis, rows)^T @ coefficients` up to the roundoff of `block`'s dtype, with d + b coefficients a
    row of `block`. Directions in which `block` has nothing left outside `basis` are replaced by random ones from
    `generator`, with coefficients of zero: the basis grows by b rows whatever the block holds.

    Args:
        block: Rows to add, float32 or float64.
        basis: Orthonormal rows already held; d may be 0, and d + b must not exceed m.
        generator: Source of the replacements, on the CPU.
    """
    scale = torch.linalg.vector_norm(block, dim=-1).double().square().amax(-1)
    first, rest = _project(block, basis)
    rows, inner = _span(rest, _DEAD[block.dtype] ** 2 * scale, generator)
    second, rest = _project(rows, basis)
    coefficients = torch.cat([first + second @ inner, inner], dim=-2)
    # What a correction takes from the length of a unit row is the square of it: below roundoff nothing is to be done.
    if bool((second.square().sum(-2) > torch.finfo(block.dtype).eps).any()):
        rest, outer = _span(rest, torch.zeros_like(scale), generator)
        coefficients[..., -block.shape[-2] :, :] = outer @ inner
    return rest, coefficients


def polish(vectors: Float64[Tensor, "batch k m"]) -> Float64[Tensor, "batch k k"]:
    """The matrix that takes nearly orthonormal rows to the nearest orthonormal ones (Loewdin); it is symmetric."""
    weights, rotation = torch.linalg.eigh(vectors @ vectors.mT)
    nearest: Tensor = (rotation * weights.rsqrt().unsqueeze(-2)) @ rotation.mT
    return nearest


def _project(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of `block` in `basis` (float64), and what `basis` does not reach."""
    if basis.shape[-2] == 0:
        return block.new_zeros(len(block), 0, block.shape[-2], dtype=torch.float64), block
    coefficients = torch.bmm(basis, block.mT)
    return coefficients.double(), torch.baddbmm(block, coefficients.mT, basis, alpha=-1)


def _span(block: Tensor, floor: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthonormal rows spanning `block` and its coefficients in them; random ones below `floor`."""
    wide = block.double()
    gram = wide @ wide.mT
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = torch.diagonal(factor, dim1=-2, dim2=-1).square()
    least = torch.maximum(floor, _HEALTHY * pivots.amax(-1))
    if bool(((failed == 0) & (pivots.amin(-1) > least)).all()):
        rows = torch.linalg.solve_triangular(factor, wide, upper=False)
        return rows.to(block.dtype), factor.mT
    return _span_by_eigenvectors(block.dtype, wide, gram, floor, generator)


def _span_by_eigenvectors(
    dtype: torch.dtype, wide: Tensor, gram: Tensor, floor: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The same where rows nearly depend on each other."""
    weights, vectors = torch.linalg.eigh(gram)
    # Below 1e-13 of the largest, an eigenvalue of the Gram matrix is its own roundoff.
    floor = torch.maximum(floor, 1e-13 * weights[..., -1])
    live = weights > floor.unsqueeze(-1)
    lengths = torch.where(live, weights, 0.0).sqrt()
    inverse = torch.where(live, lengths, 1.0).reciprocal() * live
    rows = ((vectors * inverse.unsqueeze(-2)).mT @ wide).to(dtype)
    if not bool(live.all()):
        rows = torch.where(live.unsqueeze(-1), rows, _random_like(rows, generator))
    return rows, lengths.unsqueeze(-1) * vectors.mT


def _random_like(block: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian rows of expected length one, the same for every matrix of the batch."""
    length = float(block.shape[-1]) ** 0.5
    drawn = torch.randn(block.shape[-2:], generator=generator, dtype=torch.float64) / length
    filled: Tensor = drawn.to(block)
    return filled.expand_as(block)
