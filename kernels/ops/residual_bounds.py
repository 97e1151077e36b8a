"""How far an approximate truncated SVD can be from the true one, from its residuals.

Found is `F = U S V^T`. H is the Gram matrix `delta^T delta` seen from the side whose Ritz vectors V satisfy
`delta V = U S + R1` with R1 of roundoff size (or the transpose; LoX and this bound commute with
transposition), `R2 = delta^T U - V S`, theta_i = s_i^2, and lambda_i = sigma_i^2 are H's eigenvalues. Then

    H V = V Theta + R,   R = R2 S + delta^T R1,   F = delta V V^T - R1 V^T,

so F is, up to R1, the projection of delta on span(V), and all that is missing is how far span(V) is from the
leading eigenspace of H. Let mu_c bound the largest eigenvalue of H compressed to the complement of the first
c Ritz vectors, and let R_c, Theta_c be the first c columns of R and the first c Ritz values.

*Energy.* An eigenvalue lambda of H above mu_l is an eigenvalue of `Theta_l + R_l^T (lambda - H_22)^-1 R_l` (Schur
complement), which is at most `Theta_l + R_l^T R_l / (theta_k - mu_l)`. Hence for every l >= k with mu_l < theta_k

    sum_{i<=k} (lambda_i - theta_i) <= sum_{i<=k} (eig_i(Theta_l + R_l^T R_l / (theta_k - mu_l)) - theta_i),

quadratic in the residuals; for l = k it is `trace(R^T R) / (theta_k - mu_k)`. No gap at k itself is needed.

*Subspace.* Let W hold the true eigenvectors beyond the c-th, X = V^T W. From `H V = V Theta + R` follows
`x_ij (lambda_j - theta_i) = (R^T W)_ij` (Davis and Kahan 1970, Wedin 1972, entry by entry), and expanding traces
`||P_c - F_c||^2 = (energy deficit) + 2 ||X diag(sigma)||^2`, hence

    ||P_c - F_c||_F^2 <= trace(R_c^T R_c) / (theta_c - mu_c) + 2 sum_i ||r_i||^2 mu_c / (theta_i - mu_c)^2.

For rank k the bound is the least over c <= k of this plus the norms of what lies between c and k on both sides, which
covers matrices of rank below k; where no gap shows at all, sqrt(2) ||P_k||_F holds for any projection.

*mu.* `mu_c <= ||delta||_F^2 - theta_1 - ... - theta_c` always. The sharper value used, `(s_{c+1} + r_{c+1})^2` with
r the residual of the next Ritz triplet, is what the certificate rests on: it holds unless the random start missed
a direction of that strength. Of b equally strong directions a block of b sees all, so c stays below b.

*Roundoff.* Residuals are formed in float64 from the products made; each product of `delta` with a unit vector is
taken to carry an error of up to `16 u s_1` (u: unit roundoff of the products), the errors of different vectors
as independent (Higham and Mary 2019) and no more than a quarter of each as lying along any one vector, and the
factors to carry one rounding of relative size u each.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Error of one product of delta with a unit vector, in units of the products' roundoff and of s_1. Measured: 1.2 to
# 9.6 over Gaussian, spiked, one-signed and outlier-ridden matrices of 200 to 20000 rows and columns.
PRODUCT_NOISE = 16.0
# Largest part of a product's error along a given direction; independent errors give 1/sqrt(m), below 0.1.
_ALIGNMENT = 0.25
# (R + N)^T (R + N) <= (1 + t) R^T R + (1 + 1/t) N^T N with t = 1/4.
_INFLATION, _NOISE_INFLATION = 1.25, 5.0


@dataclass(frozen=True)
class Residuals:
    """Ritz values of each matrix in falling order, with what is known of their residuals; all float64.

    Attributes:
        values: Ritz values s, one more than the rank at least; a value past the last singular value is 0.
        gram: `R2^T R2`, of the residuals on the inner side.
        outer: Column norms of R1, the residuals on the outer side.
        energy: Squared Frobenius norm of each matrix.
        roundoff: Unit roundoff of the products.
    """

    values: Float[Tensor, "batch l"]
    gram: Float[Tensor, "batch l l"]
    outer: Float[Tensor, "batch l"]
    energy: Float[Tensor, " batch"]
    roundoff: float


@dataclass(frozen=True)
class Bounds:
    """Bounds relative to P_k, one per matrix: on the error and on the energy missed."""

    error: Float[Tensor, " batch"]
    energy_deficit: Float[Tensor, " batch"]


def bounds(known: Residuals, rank: int, stored_roundoff: float) -> Bounds:
    """Bounds on `||P_k - found||_F / ||P_k||_F` and on the relative energy deficit of the first `rank` triplets.

    Args:
        known: At least rank + 1 Ritz values and residuals.
        rank: The k of P_k.
        stored_roundoff: Unit roundoff of the dtype in which the factors are handed out.
    """
    theta = known.values.square()
    noise = PRODUCT_NOISE * known.roundoff * known.values[:, :1]
    mu = _complement(known, theta, noise)
    gram = known.gram * known.values.unsqueeze(-1) * known.values.unsqueeze(-2)
    error, deficit = _by_gap_below(known, theta, mu, gram, noise, rank)
    for beyond in _gaps_beyond(rank, theta.shape[-1]):
        deficit = torch.minimum(deficit, _by_gap_beyond(known, theta, mu, gram, noise, rank, beyond))
    held = theta[:, :rank].sum(-1)
    scale = torch.where(held > 0, held, 1.0)
    outer = (known.outer[:, :rank] + noise).square().sum(-1) / scale
    stored = 3 * stored_roundoff
    relative = torch.minimum((error / scale).sqrt(), torch.full_like(scale, 2**0.5))
    nothing = held == 0
    return Bounds(
        (relative + outer.sqrt() + stored).masked_fill(nothing, 0.0),
        (deficit / scale + outer + stored**2).masked_fill(nothing, 0.0),
    )


def _complement(known: Residuals, theta: Tensor, noise: Tensor) -> Tensor:
    """mu_c for c = 0 .. l - 1: the largest eigenvalue of H outside the first c Ritz vectors."""
    inner = torch.diagonal(known.gram, dim1=-2, dim2=-1)
    radius = (inner + known.outer.square()).sqrt() + noise
    # The squared norm of delta is itself a sum of rounded squares.
    slack = 16 * known.roundoff * known.energy.unsqueeze(-1)
    unseen = known.energy.unsqueeze(-1) - (theta.cumsum(-1) - theta) + slack
    return torch.minimum((known.values + radius).square(), unseen.clamp_min(0.0))


def _disturbance(known: Residuals, mu: Tensor, noise: Tensor, count: int) -> Tensor:
    """Squared size of what roundoff adds to the first `count` columns of R; `mu` has a last axis to spread over."""
    outer = known.outer[:, :count] + noise
    return (_over(known.values[:, :count] * noise, mu) + mu.sqrt() * _over(outer, mu)).square()


def _over(columns: Tensor, mu: Tensor) -> Tensor:
    """`columns` (batch, i) beside every `mu` (batch, c, 1), or beside the one (batch, 1)."""
    return columns.unsqueeze(1) if mu.dim() == 3 else columns


def _by_gap_below(
    known: Residuals, theta: Tensor, mu: Tensor, gram: Tensor, noise: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Squared error and energy deficit (absolute), from the best gap at or before the rank; axes (batch, c, i)."""
    before = torch.ones(rank, rank, dtype=torch.bool, device=theta.device).tril()
    bound = mu[:, 1 : rank + 1].unsqueeze(-1)
    gaps = theta[:, None, :rank] - bound
    nearest = torch.diagonal(gaps, dim1=-2, dim2=-1)
    usable = nearest > 0
    gaps = torch.where(before & usable.unsqueeze(-1), gaps, 1.0)
    inner = torch.diagonal(gram, dim1=-2, dim2=-1)[:, None, :rank]
    leak = (_INFLATION * inner + _NOISE_INFLATION * _disturbance(known, bound, noise, rank)) * before
    missed = torch.where(usable, leak.sum(-1) / torch.where(usable, nearest, 1.0), torch.inf)
    turned = missed + 2 * (leak * bound / gaps.square()).sum(-1)
    tail = torch.arange(rank - 1, -1, -1, device=theta.device) * mu[:, 1 : rank + 1]
    held = theta[:, :rank].cumsum(-1)
    kept = (held[:, -1:] - held).clamp_min(0.0)
    error = (turned.sqrt() + tail.sqrt() + kept.sqrt()).square().amin(-1)
    nothing = rank * mu[:, 0]
    without = (nothing.sqrt() + held[:, -1].sqrt()).square()
    return torch.minimum(error, without), torch.minimum((missed + tail).amin(-1), nothing)


def _by_gap_beyond(
    known: Residuals, theta: Tensor, mu: Tensor, gram: Tensor, noise: Tensor, rank: int, beyond: int
) -> Tensor:
    """Energy deficit (absolute) from the gap between theta_rank and what lies outside `beyond` Ritz vectors."""
    gap, usable = _gap(theta[:, rank - 1 : rank], mu[:, beyond : beyond + 1])
    added = _NOISE_INFLATION * _disturbance(known, mu[:, beyond : beyond + 1], noise, beyond)
    leak = _INFLATION * gram[:, :beyond, :beyond] + torch.diag_embed(added)
    diagonal = theta[:, :beyond] + _coupling(known, theta, noise, rank, beyond)
    shifted = torch.diag_embed(diagonal) + leak / gap.unsqueeze(-1)
    missed = torch.linalg.eigvalsh(shifted)[:, -rank:].sum(-1) - theta[:, :rank].sum(-1)
    return torch.where(usable, missed.clamp_min(0.0), torch.inf)


def _coupling(known: Residuals, theta: Tensor, noise: Tensor, rank: int, beyond: int) -> Tensor:
    """What to add to theta so that roundoff between kept and other Ritz vectors can be left out.

    V^T H V is diagonal up to a block N between the two, and `[0 N; N^T 0] <= diag(|N|^2 / w, w)` for every
    weight w: a quarter of the gap, or |N| where that is more.
    """
    size = _ALIGNMENT * known.values[:, :1] * (known.outer.amax(-1, keepdim=True) + noise)
    weight = torch.maximum((theta[:, rank - 1 : rank] - theta[:, rank : rank + 1]) / 4, size)
    kept = size.square() / torch.where(weight > 0, weight, 1.0)
    return torch.cat([kept.expand(-1, rank), weight.expand(-1, beyond - rank)], dim=-1)


def _gap(theta: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """theta - mu, with 1 in place of what is not positive, and whether all of a row is."""
    gap = theta - mu
    return torch.where(gap > 0, gap, 1.0), (gap > 0).all(-1)


def _gaps_beyond(rank: int, count: int) -> list[int]:
    """At most four numbers of Ritz vectors above `rank` after which to look for a gap."""
    return sorted({rank + round((count - 1 - rank) * part / 4) for part in (1, 2, 3, 4)} - {rank})
