"""Orthonormal blocks against a growing basis.

Block classical Gram-Schmidt, applied twice (Giraud, Langou, Rozloznik, 2005: twice is enough), with each
block made orthonormal through the eigenvectors of its Gram matrix (SVQB: Stathopoulos and Wu, SIAM J. Sci.
Comput. 23, 2002). The Gram matrix and its eigenvectors are float64, so that one block of float32 columns
survives condition numbers up to 1e6 and needs no small LAPACK factorisation of the tall matrix.
"""

import torch
from jaxtyping import Float
from torch import Tensor

# A column this much smaller than the block it came from is the roundoff of the product that made it.
_DEAD = {torch.float32: 1e-6, torch.float64: 1e-7}


def orthonormalise(
    block: Float[Tensor, "batch m b"], basis: Float[Tensor, "batch m d"], generator: torch.Generator
) -> tuple[Float[Tensor, "batch m b"], Float[Tensor, "batch rows b"]]:
    """Orthonormal columns that continue `basis`, and the float64 coefficients of `block` in both.

    `block = concat(basis, columns) @ coefficients` up to the roundoff of `block`'s dtype, with `rows = d + b`.
    Directions in which `block` has nothing left outside `basis` are replaced by random ones from
    `generator`, with coefficients of zero: the basis grows by b columns whatever the block holds.

    Args:
        block: Columns to add, float32 or float64.
        basis: Orthonormal columns already held; d may be 0, and d + b must not exceed m.
        generator: Source of the replacements, on the CPU.
    """
    scale = block.double().square().sum(-2).amax(-1)
    first, rest = _project(block, basis)
    columns, inner = _span(rest, _DEAD[block.dtype] ** 2 * scale, generator)
    second, rest = _project(columns, basis)
    columns, outer = _span(rest, torch.zeros_like(scale), generator)
    return columns, torch.cat([first + second @ inner, outer @ inner], dim=-2)


def polish(vectors: Float[Tensor, "batch m k"]) -> Float[Tensor, "batch k k"]:
    """The matrix that takes nearly orthonormal float64 columns to the nearest orthonormal ones (Loewdin)."""
    weights, rotation = torch.linalg.eigh(vectors.mT @ vectors)
    nearest: Tensor = (rotation * weights.rsqrt().unsqueeze(-2)) @ rotation.mT
    return nearest


def _project(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of `block` in `basis` (float64), and what `basis` does not reach."""
    coefficients = basis.mT @ block
    return coefficients.double(), block - basis @ coefficients


def _span(block: Tensor, floor: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthonormal columns spanning `block` and its coefficients in them; random ones below `floor`."""
    wide = block.double()
    weights, vectors = torch.linalg.eigh(wide.mT @ wide)
    # Below 1e-13 of the largest, an eigenvalue of the Gram matrix is its own roundoff.
    floor = torch.maximum(floor, 1e-13 * weights[..., -1])
    live = weights > floor.unsqueeze(-1)
    lengths = torch.where(live, weights, 0.0).sqrt()
    inverse = torch.where(live, lengths, 1.0).reciprocal() * live
    columns = (wide @ (vectors * inverse.unsqueeze(-2))).to(block.dtype)
    if not bool(live.all()):
        columns = torch.where(live.unsqueeze(-2), columns, _random_like(columns, generator))
    return columns, lengths.unsqueeze(-1) * vectors.mT


def _random_like(block: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian columns of expected length one, the same for every matrix of the batch."""
    length = float(block.shape[-2]) ** 0.5
    drawn = torch.randn(block.shape[-2:], generator=generator, dtype=torch.float64) / length
    filled: Tensor = drawn.to(block)
    return filled.expand_as(block)
