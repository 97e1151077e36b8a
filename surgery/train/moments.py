"""The eigenvalues of the second moments of hidden states, and what changes them, over all rows of a step.

With Z the hidden states of n tokens (rows), S = Z^T Z / n, or of Z less its mean. It couples all tokens of a step:
moments are of all micro-batches and processes together. Regularisers are taken of S / tr S, and R_ill is divided by
the number of eigenvalues, so that weights depend neither on the size of the states nor on how many tokens there are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.conditioning import regularisers
from surgery.conditioning.regularisers import Kind
from surgery.train.step import Step

States = Float[Tensor, "tokens width"]
Values = Float[Tensor, " p"]


@dataclass(frozen=True)
class Moments:
    """What one process knows of S, all in float64.

    Attributes:
        values: The eigenvalues that may be other than zero, min(n, width) of them, descending.
        zero: What counts as zero, as a share of the largest: what rounding in the states' own dtype makes of zero.
        states: Those of this process, less the mean if S is centred.
        count: n, over all processes.
        vectors: An eigenvector for each value, of Z Z^T (`dual`) or of Z^T Z, as columns.
        dual: Whose eigenvectors those are.
    """

    values: Values
    zero: float
    states: States
    count: int
    vectors: Float[Tensor, "side p"]
    dual: bool

    @property
    def kappa(self) -> float:
        """The largest eigenvalue over the smallest that is not zero."""
        return regularisers.condition_number(self.values, self.zero)

    def regulariser(self, kind: Kind) -> tuple[float, States]:
        """R of S / tr S (R_ill over p), and its derivative with respect to this process's states."""
        values = self.values.clone().requires_grad_()
        value = regularisers.regulariser(kind, values / values.sum(), self.zero)
        if kind == "ill":
            value = value / len(values)
        [slopes] = torch.autograd.grad(value, values)
        return float(value.detach()), self.derivative(slopes)

    def derivative(self, slopes: Values) -> States:
        """That of sum_i slopes_i s_i with respect to this process's states: 2/n Z V diag(slopes) V^T."""
        if self.dual:
            pulled = self.vectors @ (slopes[:, None] * (self.vectors.T @ self.states))
        else:
            pulled = (self.states @ self.vectors * slopes) @ self.vectors.T
        return 2 / self.count * pulled


def moments(states: States, step: Step, *, centred: bool) -> Moments:
    """S of the states of all processes.

    A process that is alone and has fewer tokens than a state has entries takes the eigenvalues of Z Z^T / n.

    Args:
        states: Of this process's tokens; may be none.
        step: Adds up over processes.
        centred: Whether the mean is taken off.
    """
    wide = states.detach().double()
    tokens, width = wide.shape
    sums = step.summed(torch.cat([wide.sum(0), wide.new_tensor([float(tokens), 1.0])]))
    count, processes = int(sums[-2]), int(sums[-1])
    if centred:
        wide = wide - sums[:width] / count
    dual = processes == 1 and tokens < width
    matrix = wide @ wide.T / count if dual else step.summed(wide.T @ wide) / count
    found, vectors = torch.linalg.eigh(matrix)
    size = max(1, min(count - centred, width))
    values = found.flip(0)[:size].clamp_min(0)
    zero = _rounding(states.dtype, count, width, values)
    return Moments(values, zero, wide, count, vectors.flip(1)[:, :size], dual)


def _rounding(dtype: torch.dtype, count: int, width: int, values: Values) -> float:
    """What rounding every entry of Z can add to an eigenvalue, as a share of the largest one.

    A matrix of independent errors of standard deviation e has a largest singular value of about e (sqrt n + sqrt d).
    """
    least = max(count, width) * torch.finfo(torch.float64).eps
    if float(values[0]) == 0:
        return least
    entry = torch.finfo(dtype).eps * float(values.sum() / width) ** 0.5
    return max(least, (entry * (count**0.5 + width**0.5)) ** 2 / count / float(values[0]))
