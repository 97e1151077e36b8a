"""R_well and R_ill: functions of the singular values of a matrix that fall as it gets better, or worse, conditioned.

For a matrix S of p singular values s_1 >= s_2 >= ..., k of which are not zero, both to be minimised,

    R_well(S) = 1/2 s_1^2 - 1/(2p) sum_i s_i^2         at least 0, and 0 only where all are equal
    R_ill(S)  = 1 / D,  D = 1/(2k) sum_i s_i^2 - 1/2 s_k^2   above 0, and towards 0 as kappa = s_1 / s_k grows

R_well is of Nenov, Haider, Chen 2024; R_ill of Zheng, Bai, Bullins, Yeh: "Model Immunization from a Condition Number
Perspective", ICML 2025, https://arxiv.org/abs/2505.23760 (section 3), where 1 / log kappa <= s_1^2 R_ill (theorem
4.1). All take singular values, in descending order; `torch.linalg.svdvals` and `eigvalsh` carry their derivatives, in
`slopes` given in closed form, on to the matrix.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Values = Float[Tensor, " p"]
Kind = Literal["well", "ill", "neg_well"]
"""`neg_well` is what a tutorial gives as R_ill: minus R_well, unbounded below; to be taken with the norm held."""

FLOOR = 1e-6
"""The least that D may be, as a share of 1/(2k) sum s_i^2; see `r_ill`."""


def rank_of(values: Values, tolerance: float | None = None) -> int:
    """How many singular values are not zero, at least 1.

    Args:
        values: In descending order.
        tolerance: What counts as zero, as a share of the largest; by default p times the spacing of the dtype.
    """
    share = len(values) * torch.finfo(values.dtype).eps if tolerance is None else tolerance
    return max(1, int((values > share * values[0]).sum()))


def condition_number(values: Values, tolerance: float | None = None) -> float:
    """kappa: the largest singular value over the smallest that is not zero; infinite where all are zero."""
    smallest = float(values[rank_of(values, tolerance) - 1])
    return float(values[0]) / smallest if smallest > 0 else float("inf")


def r_well(values: Values) -> Float[Tensor, ""]:
    """1/2 s_1^2 - 1/(2p) sum s^2."""
    return (values[0].square() - values.square().mean()) / 2


def r_ill(values: Values, tolerance: float | None = None, floor: float = FLOOR) -> Float[Tensor, ""]:
    """1 / (1/(2k) sum s^2 - 1/2 s_k^2), with the rank k as `rank_of` counts it.

    Where all singular values are equal it is infinite and so is its derivative; there D is taken as `floor` times its
    first term, in the value and in the derivative, which keeps its direction.
    """
    rank = rank_of(values, tolerance)
    mean = values[:rank].square().mean()
    gap = (mean - values[rank - 1].square()) / 2
    least = floor * mean.detach() / 2
    return 1 / (gap + (least - gap).clamp_min(0).detach())


def regulariser(
    kind: Kind, values: Values, tolerance: float | None = None, floor: float = FLOOR
) -> Float[Tensor, ""]:
    """R_well, R_ill or minus R_well."""
    if kind == "ill":
        return r_ill(values, tolerance, floor)
    return r_well(values) if kind == "well" else -r_well(values)


def slopes(kind: Kind, values: Values, tolerance: float | None = None, floor: float = FLOOR) -> Values:
    """The derivative m_i of a regulariser with respect to every singular value.

    R_well: s_1 [i = 1] - s_i / p        R_ill: (s_k [i = k] - s_i / k) / D^2 for i up to k, and 0 beyond
    """
    if kind != "ill":
        found = -values / len(values)
        found[0] += values[0]
        return found if kind == "well" else -found
    rank = rank_of(values, tolerance)
    found = torch.zeros_like(values)
    found[:rank] = -values[:rank] / rank
    found[rank - 1] += values[rank - 1]
    return found * r_ill(values, tolerance, floor).square()
