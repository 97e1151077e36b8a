"""Condition number immunisation of a linear extractor, as its paper has it.

The extractor is f(x) = theta^T x, and whoever fine-tunes fits a linear probe on top. With X_P and X_H the features of
the primary and of the harmful task (rows), K = X^T X / N of each, the probe's Hessian is H = theta^T K theta. What is
minimised together with the primary task's loss L is lam_P R_well(H_P) + lam_H R_ill(H_H): probing then stays easy on
the primary task and takes gradient descent long on the harmful one, whose labels are not needed.

    w     <- w - eta dL/dw
    theta <- theta - eta [dL/dtheta + lam_P K_P^-1 dR_well/dtheta + lam_H K_H^-1 dR_ill/dtheta]

Zheng, Bai, Bullins, Yeh: "Model Immunization from a Condition Number Perspective", ICML 2025,
https://arxiv.org/abs/2505.23760 (Algorithm 1).

As dR(H)/dtheta = 2 K theta M with M = dR/dH, a regulariser's own step is theta (I - 2 eta lam M): the eigenvectors of
H stay and its eigenvalues become s_i (1 - 2 eta lam m_i)^2. That is why K^-1 must stand on the side of the inputs.
The authors' code, which holds W = theta^T, solves (K + ridge) Z = dR/dW, and so has it on the other side.

Departures, with reasons:
  * K is divided by the number of rows, so that the weights of the terms do not depend on it;
  * no term changes an eigenvalue by a factor beyond (1 - 2 cap)^2 and (1 + 2 cap)^2 in a step: R_ill is infinite at
    kappa = 1, and the step that the paper allows R_well can lose the largest eigenvalue and raise kappa;
  * the defaults are for this scale, and give its table's shape on `problems.tasks()` (docs/methods.md);
  * gradient descent on all rows, as in the theory: the authors' code uses batches, whose K is singular, and Adam,
    whose steps are not those of the theory.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.conditioning.regularisers import Kind, condition_number, regulariser, slopes
from surgery.errors import InputError, UsageError

Rows = Float[Tensor, "rows inputs"]
Square = Float[Tensor, "inputs inputs"]
Extractor = Float[Tensor, "inputs hidden"]


@dataclass(frozen=True)
class Tasks:
    """What an extractor is made good and bad for; both of the same width.

    Attributes:
        primary: Inputs of the primary task, float64.
        targets: Their regression targets, one for each row.
        harmful: Inputs of the harmful task, float64.
    """

    primary: Rows
    targets: Float[Tensor, " rows"]
    harmful: Float[Tensor, "others inputs"]


@dataclass(frozen=True)
class Conditioning:
    """Settings of Algorithm 1.

    Attributes:
        steps: Of gradient descent.
        lr: eta, for both.
        lam_well: Weight of R_well on the primary task.
        lam_ill: Weight of R_ill on the harmful task.
        ridge: Added to the diagonal of K before it is inverted, as a share of its mean; 0 needs K of full rank.
        cap: The most that eta lam |m_i| may be for any i; below 1/2, where a singular value is annihilated.
    """

    steps: int = 300
    lr: float = 5e-2
    lam_well: float = 10.0
    lam_ill: float = 1.0
    ridge: float = 0.0
    cap: float = 0.25

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("lr", 0.0), ("lam_well", 0.0), ("lam_ill", 0.0), ("ridge", 0.0)):
            if not least <= getattr(self, name) < float("inf"):
                raise UsageError(
                    f"{name} is {getattr(self, name)}; it must be a finite number of at least {least}"
                )
        if not 0 < self.cap < 0.5:
            raise UsageError(
                f"cap is {self.cap}; it must be above 0 and below 0.5, where a singular value is lost"
            )


@dataclass(frozen=True)
class Immunised:
    """An extractor and how it came about.

    Attributes:
        extractor: theta.
        probe: w of the primary task.
        losses: L before every step and after the last.
        primary: kappa of H_P at the same times.
        harmful: kappa of H_H likewise.
    """

    extractor: Extractor
    probe: Float[Tensor, " hidden"]
    losses: list[float]
    primary: list[float]
    harmful: list[float]


class _Preconditioned(torch.autograd.Function):
    """The identity, through which a gradient comes back multiplied by an inverse."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return torch.cholesky_solve(gradients[0], factor), None


def preconditioned(theta: Extractor, factor: Square) -> Extractor:
    """theta as it is; its gradient comes back as K^-1 times what it was (the paper's dummy layer).

    A layer that holds W = theta^T takes `preconditioned(W.T, factor).T`, and its gradient is dR/dW K^-1.

    Args:
        theta: The extractor.
        factor: The lower Cholesky factor of K, from `factor_of`.
    """
    found: Tensor = _Preconditioned.apply(theta, factor)
    return found


def gram(rows: Rows) -> Square:
    """K = X^T X / N in float64."""
    wide = rows.double()
    return wide.T @ wide / len(wide)


def factor_of(matrix: Square, ridge: float = 0.0) -> Square:
    """The lower Cholesky factor of K + ridge (tr K / n) I.

    Raises:
        InputError: It is singular: fewer rows than inputs, or inputs that others determine.
    """
    raised = matrix + ridge * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
    factor, failed = torch.linalg.cholesky_ex(raised)
    # A factor of a matrix that is singular but for rounding inverts nothing but the rounding.
    smallest, largest = factor.diagonal().abs().min(), factor.diagonal().abs().max()
    if int(failed) or smallest.square() <= len(matrix) * torch.finfo(matrix.dtype).eps * largest.square():
        raise InputError(
            f"the features' {len(matrix)} x {len(matrix)} matrix K is singular and cannot be inverted; give more "
            "rows than inputs, leave out inputs that others determine, or give a ridge such as 1e-6"
        )
    return factor


def hessian(theta: Extractor, matrix: Square) -> Float[Tensor, "hidden hidden"]:
    """H = theta^T K theta."""
    return theta.T @ matrix @ theta


def singular_values(symmetric: Float[Tensor, "hidden hidden"]) -> Float[Tensor, " hidden"]:
    """Those of a positive semidefinite matrix, descending, with their derivatives."""
    return torch.linalg.eigvalsh(symmetric).flip(0).clamp_min(0)


def kappa(theta: Extractor, matrix: Square) -> float:
    """The condition number of H."""
    return condition_number(singular_values(hessian(theta, matrix)))


def regularised(
    kind: Kind, theta: Extractor, matrix: Square, factor: Square, weight: float, settings: Conditioning
) -> Float[Tensor, ""]:
    """A term of the objective, its gradient preconditioned and its weight held to what one step may be."""
    values = singular_values(hessian(preconditioned(theta, factor), matrix))
    steepest = settings.lr * float(slopes(kind, values.detach()).abs().max())
    return min(weight, settings.cap / steepest if steepest else weight) * regulariser(kind, values)


def immunise(tasks: Tasks, settings: Conditioning = Conditioning()) -> Immunised:
    """Algorithm 1 from theta = I and w = 0, in float64 on the CPU; the same for the same input.

    Raises:
        InputError: A task's K is singular.
        UsageError: The rate is too high: the primary loss is no longer finite.
    """
    rows, targets = tasks.primary.double(), tasks.targets.double()
    primary, harmful = gram(tasks.primary), gram(tasks.harmful)
    factors = factor_of(primary, settings.ridge), factor_of(harmful, settings.ridge)
    theta = torch.eye(rows.shape[1], dtype=torch.float64, requires_grad=True)
    probe = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    found = Immunised(theta, probe, [], [], [])

    def loss() -> Tensor:
        value = (rows @ theta @ probe - targets).square().mean() / 2
        if not math.isfinite(float(value.detach())):
            raise UsageError(
                f"the loss of the primary task is no longer finite; lower lr (here {settings.lr:g})"
            )
        found.losses.append(float(value.detach()))
        found.primary.append(kappa(theta.detach(), primary))
        found.harmful.append(kappa(theta.detach(), harmful))
        return value

    for _ in range(settings.steps):
        total = loss()
        total = total + regularised("well", theta, primary, factors[0], settings.lam_well, settings)
        total = total + regularised("ill", theta, harmful, factors[1], settings.lam_ill, settings)
        gradients = torch.autograd.grad(total, (theta, probe))
        with torch.no_grad():
            theta.sub_(gradients[0], alpha=settings.lr)
            probe.sub_(gradients[1], alpha=settings.lr)
    loss()
    return Immunised(theta.detach(), probe.detach(), found.losses, found.primary, found.harmful)
