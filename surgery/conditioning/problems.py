"""Two tasks made to a wish: inputs whose second moments have given eigenvalues, in the same basis or in another."""

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.conditioning.linear import Rows, Tasks
from surgery.train.seeding import seeded


def rotation(size: int, source: torch.Generator) -> Float[Tensor, "size size"]:
    """A random orthogonal matrix in float64."""
    basis, upper = torch.linalg.qr(torch.randn(size, size, generator=source, dtype=torch.float64))
    return basis * upper.diagonal().sign()


def inputs(
    rows: int, eigenvalues: Float[Tensor, " n"], basis: Float[Tensor, "n n"], source: torch.Generator
) -> Rows:
    """Rows with X^T X / N = Q diag(eigenvalues) Q^T up to rounding; needs at least as many rows as eigenvalues."""
    spread = torch.linalg.qr(torch.randn(rows, len(eigenvalues), generator=source, dtype=torch.float64))[0]
    return rows**0.5 * spread * eigenvalues.sqrt() @ basis.T


def tasks(
    *,
    size: int = 79,
    rows: int = 1000,
    spread: float = 1e4,
    rotated: bool = True,
    noise: float = 0.1,
    seed: int = 0,
) -> Tasks:
    """A regression and a harmful task of the shape of the paper's house prices (79 inputs).

    Args:
        size: Inputs.
        rows: Of either task.
        spread: kappa of both K: their eigenvalues fall geometrically from 1 to 1 / spread.
        rotated: Whether the harmful task's eigenvectors are others; if not, both K are the same.
        noise: Standard deviation of what the primary targets have beside a linear function of variance 1.
        seed: Of everything drawn.
    """
    source = torch.Generator().manual_seed(seeded(seed, "conditioning"))
    eigenvalues = torch.logspace(0, 1, size, base=1 / spread, dtype=torch.float64)
    basis = rotation(size, source)
    other = rotation(size, source) if rotated else basis
    primary = inputs(rows, eigenvalues, basis, source)
    signal = primary @ torch.randn(size, generator=source, dtype=torch.float64)
    jitter = torch.randn(rows, generator=source, dtype=torch.float64)
    return Tasks(primary, signal / signal.std() + noise * jitter, inputs(rows, eigenvalues, other, source))
