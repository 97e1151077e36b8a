"""What an immunised extractor is worth: the ratios of condition numbers, and the steps that probing takes."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.conditioning.linear import Extractor, Square, kappa
from surgery.errors import UsageError


@dataclass(frozen=True)
class Ratios:
    """How condition numbers of the probe's Hessian changed, against probing the inputs themselves.

    Attributes:
        harmful: (i), kappa(H_H(theta)) / kappa(H_H(I)): to be large.
        primary: (ii), kappa(H_P(theta)) / kappa(H_P(I)): to be at most 1.
    """

    harmful: float
    primary: float

    @property
    def relative(self) -> float:
        """The relative immunisation ratio (RIR), (i) over (ii): well above 1; 1 for theta = I."""
        return self.harmful / self.primary


def ratios(theta: Extractor, primary: Square, harmful: Square) -> Ratios:
    """The paper's table 1 for an extractor, with K of either task."""
    plain = torch.eye(len(primary), dtype=primary.dtype)
    return Ratios(
        harmful=kappa(theta, harmful) / kappa(plain, harmful),
        primary=kappa(theta, primary) / kappa(plain, primary),
    )


def probing_steps(
    features: Float[Tensor, "rows hidden"],
    targets: Float[Tensor, " rows"],
    *,
    close: float = 1e-3,
    most: int = 100_000,
) -> int:
    """Steps of gradient descent with exact line search until a linear probe's loss is near the least there is.

    With a rate found anew for every step only the shape of the loss counts, not its scale; a fixed rate would hide
    kappa behind it.

    Args:
        features: f(x) of every row, float64.
        targets: What the probe is to give.
        close: Share of the first excess over the least loss that may be left; above 0 and below 1.
        most: After so many it is given up.

    Returns:
        The steps, at most `most`.

    Raises:
        UsageError: `close` is not between 0 and 1.
    """
    if not 0 < close < 1:
        raise UsageError(f"close is {close}; it must be above 0 and below 1")
    basis, values, _ = torch.linalg.svd(features, full_matrices=False)
    # In the basis of the singular vectors: the part of the targets that the probe has yet to reach.
    left = (basis.T @ targets)[values > len(values) * torch.finfo(values.dtype).eps * values[0]]
    curvature = values[: len(left)].square()
    goal = close * left.square().sum()
    for number in range(most):
        if left.square().sum() <= goal:
            return number
        gradient = curvature * left.square()
        left = left * (1 - curvature * gradient.sum() / (curvature * gradient).sum())
    return most
