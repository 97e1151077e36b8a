"""Truncated singular value decompositions that come with a certificate.

Found is `F = U S V^T`, from a block Krylov iteration (`surgery.kernels.block_krylov`) that goes on until the
certificate holds. Below, H is the Gram matrix `delta^T delta` seen from the side whose Ritz vectors V satisfy
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

*Roundoff.* Residuals are formed in float64 from the products made; each product of `delta` with a unit vector is taken
to carry an error of up to `16 u s_1` (u: unit roundoff of the products), the errors of different vectors
as independent (Higham and Mary 2019), and the factors one rounding of relative size u each.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.errors import InputError, UsageError
from surgery.kernels import block_krylov

Method = Literal["certified", "exact"]

# Up to this size the full decomposition in float64 costs less than the iteration's checks.
_SMALL = 128
# Largest shorter side for which an exact decomposition is made in float64 whatever the input.
_WIDE = 1024
# Further passes granted to turn a certified energy into a certified subspace, and how near it must be.
_GRACE = 4
_NEAR = 16.0
_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_PRODUCT_NOISE = 16.0


@dataclass(frozen=True)
class Factors:
    """A rank-k matrix, or a batch of them, held as its factors: `left @ diag(values) @ right`."""

    left: Float[Tensor, "*batch m k"]
    values: Float[Tensor, "*batch k"]
    right: Float[Tensor, "*batch k n"]

    @property
    def rank(self) -> int:
        """Number of singular directions held."""
        return self.values.shape[-1]

    def dense(self) -> Float[Tensor, "*batch m n"]:
        """The product of the factors, in their dtype."""
        return (self.left * self.values.unsqueeze(-2)) @ self.right

    def scaled(self, alpha: float) -> "Factors":
        """The factors of `alpha` times the matrix."""
        return Factors(self.left, self.values * alpha, self.right)


@dataclass(frozen=True)
class Certificate:
    """What is known about one truncated decomposition.

    Attributes:
        error: Bound on `||P_k - found||_F / ||P_k||_F`, whatever the criterion; never above 1.5, and of the order of 1
            where no gap separates the k-th singular value from the next, since P_k is then not determined.
        energy_deficit: Bound on `(||delta - found||_F^2 - ||delta - P_k||_F^2) / ||P_k||_F^2`, for every choice of P_k.
        criterion: "subspace" if `error` met the tolerance, "energy" if only `energy_deficit` met its square,
            "exact" if a full decomposition was made.
        passes: Products of a block with delta or its transpose.
        dimension: Krylov dimension reached, or min(m, n) for "exact".
    """

    error: float
    energy_deficit: float
    criterion: str
    passes: int
    dimension: int


@dataclass(frozen=True)
class Spectrum:
    """A truncated decomposition: factors, and per matrix a certificate and `||delta||_F^2`."""

    factors: Factors
    certificates: tuple[Certificate, ...]
    energy: tuple[float, ...]

    @property
    def energy_kept(self) -> tuple[float, ...]:
        """Share of each matrix's squared Frobenius norm that the factors hold, from 0 to 1; 1 for a zero matrix."""
        held = self.factors.values.double().reshape(len(self.energy), -1).square().sum(-1).tolist()
        return tuple(min(h / e, 1.0) if e > 0 else 1.0 for h, e in zip(held, self.energy, strict=True))
