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

All of this is a hundred steps on a few numbers, done in numpy: a call of torch takes several times as long.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

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

    values: Float64[ndarray, "batch l"]
    gram: Float64[ndarray, "batch l l"]
    outer: Float64[ndarray, "batch l"]
    energy: Float64[ndarray, " batch"]
    roundoff: float


@dataclass(frozen=True)
class Bounds:
    """Bounds relative to P_k, one per matrix: on the error and on the energy missed."""

    error: Float64[ndarray, " batch"]
    energy_deficit: Float64[ndarray, " batch"]


def bounds(known: Residuals, rank: int, stored_roundoff: float) -> Bounds:
    """Bounds on `||P_k - found||_F / ||P_k||_F` and on the relative energy deficit of the first `rank` triplets.

    Args:
        known: At least rank + 1 Ritz values and residuals.
        rank: The k of P_k.
        stored_roundoff: Unit roundoff of the dtype in which the factors are handed out.
    """
    # A gap of zero gives infinity or no number, which `where` and the least of several then pass over.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _bounds(known, rank, stored_roundoff)


def _bounds(known: Residuals, rank: int, stored_roundoff: float) -> Bounds:
    theta = known.values**2
    noise = PRODUCT_NOISE * known.roundoff * known.values[:, :1]
    mu = _complement(known, theta, noise)
    gram = known.gram * known.values[:, :, None] * known.values[:, None, :]
    error, deficit = _by_gap_below(known, theta, mu, gram, noise, rank)
    for beyond in _gaps_beyond(rank, theta.shape[-1]):
        deficit = np.minimum(deficit, _by_gap_beyond(known, theta, mu, gram, noise, rank, beyond))
    held = theta[:, :rank].sum(-1)
    scale = np.where(held > 0, held, 1.0)
    outer = ((known.outer[:, :rank] + noise) ** 2).sum(-1) / scale
    stored = 3 * stored_roundoff
    relative = np.minimum(np.sqrt(error / scale), 2**0.5)
    something = held != 0
    return Bounds(
        np.where(something, relative + np.sqrt(outer) + stored, 0.0),
        np.where(something, deficit / scale + outer + stored**2, 0.0),
    )


def _complement(known: Residuals, theta: ndarray, noise: ndarray) -> ndarray:
    """mu_c for c = 0 .. l - 1: the largest eigenvalue of H outside the first c Ritz vectors."""
    inner = np.diagonal(known.gram, axis1=-2, axis2=-1)
    radius = np.sqrt(inner + known.outer**2) + noise
    # The squared norm of delta is itself a sum of rounded squares.
    slack = 16 * known.roundoff * known.energy[:, None]
    unseen = known.energy[:, None] - (theta.cumsum(-1) - theta) + slack
    smallest: ndarray = np.minimum((known.values + radius) ** 2, np.maximum(unseen, 0.0))
    return smallest


def _disturbance(known: Residuals, mu: ndarray, noise: ndarray, count: int) -> ndarray:
    """Squared size of what roundoff adds to the first `count` columns of R; `mu` has a last axis to spread over."""
    outer = known.outer[:, :count] + noise
    size: ndarray = (_over(known.values[:, :count] * noise, mu) + np.sqrt(mu) * _over(outer, mu)) ** 2
    return size


def _over(columns: ndarray, mu: ndarray) -> ndarray:
    """`columns` (batch, i) beside every `mu` (batch, c, 1), or beside the one (batch, 1)."""
    return columns[:, None] if mu.ndim == 3 else columns


def _by_gap_below(
    known: Residuals, theta: ndarray, mu: ndarray, gram: ndarray, noise: ndarray, rank: int
) -> tuple[ndarray, ndarray]:
    """Squared error and energy deficit (absolute), from the best gap at or before the rank; axes (batch, c, i)."""
    before = np.tri(rank, dtype=bool)
    bound = mu[:, 1 : rank + 1, None]
    gaps = theta[:, None, :rank] - bound
    nearest = np.diagonal(gaps, axis1=-2, axis2=-1)
    usable = nearest > 0
    gaps = np.where(before & usable[:, :, None], gaps, 1.0)
    inner = np.diagonal(gram, axis1=-2, axis2=-1)[:, None, :rank]
    leak = (_INFLATION * inner + _NOISE_INFLATION * _disturbance(known, bound, noise, rank)) * before
    missed = np.where(usable, leak.sum(-1) / np.where(usable, nearest, 1.0), np.inf)
    turned = missed + 2 * (leak * bound / gaps**2).sum(-1)
    tail = np.arange(rank - 1, -1, -1) * mu[:, 1 : rank + 1]
    held = theta[:, :rank].cumsum(-1)
    kept = np.maximum(held[:, -1:] - held, 0.0)
    error = ((np.sqrt(turned) + np.sqrt(tail) + np.sqrt(kept)) ** 2).min(-1)
    nothing = rank * mu[:, 0]
    without = (np.sqrt(nothing) + np.sqrt(held[:, -1])) ** 2
    return np.minimum(error, without), np.minimum((missed + tail).min(-1), nothing)


def _by_gap_beyond(
    known: Residuals, theta: ndarray, mu: ndarray, gram: ndarray, noise: ndarray, rank: int, beyond: int
) -> ndarray:
    """Energy deficit (absolute) from the gap between theta_rank and what lies outside `beyond` Ritz vectors."""
    gap = theta[:, rank - 1 : rank] - mu[:, beyond : beyond + 1]
    usable = gap > 0
    added = _NOISE_INFLATION * _disturbance(known, mu[:, beyond : beyond + 1], noise, beyond)
    shifted = _INFLATION * gram[:, :beyond, :beyond] / np.where(usable, gap, 1.0)[:, :, None]
    diagonal = theta[:, :beyond] + _coupling(known, theta, noise, rank, beyond)
    places = np.arange(beyond)
    shifted[:, places, places] += added / np.where(usable, gap, 1.0) + diagonal
    missed = np.linalg.eigvalsh(shifted)[:, -rank:].sum(-1) - theta[:, :rank].sum(-1)
    deficit: ndarray = np.where(usable[:, 0], np.maximum(missed, 0.0), np.inf)
    return deficit


def _coupling(known: Residuals, theta: ndarray, noise: ndarray, rank: int, beyond: int) -> ndarray:
    """What to add to theta so that roundoff between kept and other Ritz vectors can be left out.

    V^T H V is diagonal up to a block N between the two, and `[0 N; N^T 0] <= diag(|N|^2 / w, w)` for every
    weight w: a quarter of the gap, or |N| where that is more.
    """
    size = _ALIGNMENT * known.values[:, :1] * (known.outer.max(-1, keepdims=True) + noise)
    weight = np.maximum((theta[:, rank - 1 : rank] - theta[:, rank : rank + 1]) / 4, size)
    kept = size**2 / np.where(weight > 0, weight, 1.0)
    return np.concatenate([kept.repeat(rank, -1), weight.repeat(beyond - rank, -1)], axis=-1)


def _gaps_beyond(rank: int, count: int) -> list[int]:
    """At most four numbers of Ritz vectors above `rank` after which to look for a gap."""
    return sorted({rank + round((count - 1 - rank) * part / 4) for part in (1, 2, 3, 4)} - {rank})
