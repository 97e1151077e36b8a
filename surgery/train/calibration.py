"""The loss of a classifier after the best linear recalibration of its logits, which no exchange of labels can raise.

    l(Z, y) = min over W in [-1, 1]^(C x C) of CE(Z W, y)

is convex in W; W = 0 gives log C, W = I the cross-entropy itself, so l is at most either. It is solved by a projected
Newton method (Bertsekas: "Projected Newton methods for optimization problems with simple constraints", 1982). With G
the gradient at W, convexity bounds what is still to be gained by

    gap = max over V in the box of <G, W - V> = <G, W> + sum |G|

By the envelope theorem the derivative of l with respect to the logits is that of CE(Z W, y) at the best W.

Henderson, Mitchell, Manning, Jurafsky, Finn: "Self-Destructing Models", AIES 2023, https://arxiv.org/abs/2211.14946,
whose code differentiates through a general convex solver instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from surgery.errors import OutputError

TOLERANCE = 1e-9
"""Nats by which a calibrated loss may be above the best."""

_ITERATIONS = 300
# Bertsekas' width of the band at a bound in which a coordinate counts as bound, and Armijo's share.
_BAND, _SHARE = 1e-3, 1e-4
_ROUNDING = 1e-15


@dataclass(frozen=True)
class Calibration:
    """The best recalibration found.

    Attributes:
        weights: W, entries from -1 to 1.
        loss: CE(Z W, y) in nats.
        gap: A bound of how far `loss` is above the least one; at most the tolerance.
        iterations: Newton steps taken.
    """

    weights: Float[Tensor, "classes classes"]
    loss: float
    gap: float
    iterations: int


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def calibration(
    logits: Float[Tensor, "rows classes"],
    targets: Int[Tensor, " rows"],
    *,
    tolerance: float = TOLERANCE,
    summed: Callable[[Tensor], Tensor] = _alone,
) -> Calibration:
    """The best W for these logits, in float64; with logits that are not finite, the gap and the loss are not either.

    Args:
        logits: Z; its history is not followed.
        targets: The classes.
        tolerance: Largest gap, in nats.
        summed: The sum of a tensor over all processes, where each has rows of its own.

    Raises:
        OutputError: The gap is still larger after 300 steps.
    """
    problem = _Problem(logits.detach().double(), targets, summed)
    weights = torch.zeros(logits.shape[-1], logits.shape[-1], dtype=torch.float64, device=logits.device)
    gap = float("inf")
    for taken in range(_ITERATIONS):
        loss, gradient, curvature = problem.derivatives(weights)
        gap = float((gradient * weights).sum() + gradient.abs().sum())
        if not gap > tolerance:
            return Calibration(weights, loss, gap, taken)
        weights = _improved(problem, weights, loss, gradient, curvature, gap)
    raise OutputError(
        f"a calibrated loss is known to {gap:.1e} nats after {_ITERATIONS} steps, not to {tolerance:.1e}; the logits "
        f"may be too large (up to {float(logits.abs().max()):.1e}): lower --lr"
    )


def calibrated_loss(
    logits: Float[Tensor, "rows classes"], targets: Int[Tensor, " rows"], *, tolerance: float = TOLERANCE
) -> Float[Tensor, ""]:
    """The calibrated loss in nats, from 0 to log C, with its derivative with respect to the logits."""
    best = calibration(logits, targets, tolerance=tolerance)
    return cross_entropy(logits @ best.weights.to(logits), targets)


class _Problem:
    """CE(Z W, y) as a function of W, over the rows of all processes."""

    def __init__(self, logits: Tensor, targets: Tensor, summed: Callable[[Tensor], Tensor]) -> None:
        self._logits, self._targets, self._summed = logits, targets, summed
        self._right = torch.nn.functional.one_hot(targets, logits.shape[-1]).double()
        self._rows = summed(torch.tensor(float(len(targets)), dtype=torch.float64, device=logits.device))

    def value(self, weights: Tensor) -> float:
        """The loss."""
        loss = cross_entropy(self._logits @ weights, self._targets, reduction="sum")
        return float(self._summed(loss) / self._rows)

    def derivatives(self, weights: Tensor) -> tuple[float, Tensor, Tensor]:
        """The loss, its gradient of (C, C), and its second derivatives of (C^2, C^2)."""
        logits, classes = self._logits, len(weights)
        shares = (logits @ weights).softmax(-1)
        loss = cross_entropy(logits @ weights, self._targets, reduction="sum")
        gradient = logits.T @ (shares - self._right)
        spread = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None, :]
        curvature = torch.einsum("ni,nj,nab->iajb", logits, logits, spread)
        packed = self._summed(torch.cat([loss[None], gradient.flatten(), curvature.flatten()])) / self._rows
        head, tail = packed[1:].split([classes**2, classes**4])
        return float(packed[0]), head.view(classes, classes), tail.view(classes**2, classes**2)


def _improved(
    problem: _Problem, weights: Tensor, loss: float, gradient: Tensor, curvature: Tensor, gap: float
) -> Tensor:
    """A step of projected Newton: coordinates held by a bound move by the gradient, the others together."""
    band = min(_BAND, gap)
    held = ((weights >= 1 - band) & (gradient < 0)) | ((weights <= band - 1) & (gradient > 0))
    free = ~held.flatten()
    size = max(float(curvature.diagonal().max()), 1e-30)
    direction = gradient.flatten() / size
    if bool(free.any()):
        # Shifting all columns of W alike changes nothing, so the second derivatives are singular.
        inner = curvature[free][:, free]
        inner = inner + (1e-12 + 1e-3 * min(gap, 1.0)) * size * torch.eye(len(inner)).to(inner)
        direction[free] = torch.linalg.solve(inner, gradient.flatten()[free])
    direction = direction.view_as(weights)
    promised = float((gradient * direction)[~held].sum())
    length = 1.0
    while length > 1e-12:
        moved = (weights - length * direction).clamp(-1.0, 1.0)
        expected = length * promised + float((gradient * (weights - moved))[held].sum())
        # Close to the best W what is gained is less than a loss is rounded by.
        if loss - problem.value(moved) >= _SHARE * expected - _ROUNDING * (1 + loss):
            return moved
        length /= 2
    return weights
