"""The loss under the first-order worst perturbation of modules' outputs, in two passes over a step's micro-batches.

With g_l the gradient of the loss with respect to the output of module l, the worst perturbation of joint norm rho is
rho g_l / ||(g_1 .. g_L)||: found by the first pass, added as a constant in the second (Vaccine, Algorithm 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.train import perturb
from surgery.train.losses import answer_loss, answered_count
from surgery.train.step import Batch, Step

# The authors' guard against a gradient of zero.
_GUARD = 1e-7


@dataclass(frozen=True)
class Unperturbed:
    """What the first pass found on this process, micro-batch by micro-batch.

    Attributes:
        gradients: Of the loss with respect to every module's output.
        states: The random numbers that each micro-batch began with.
        loss: The sum of this process's parts of the loss.
        count: Answered tokens of the step, over all processes.
    """

    gradients: list[list[Tensor]]
    states: list[perturb.Randomness]
    loss: Tensor
    count: int


def first_pass(
    model: nn.Module, batches: Sequence[Batch], modules: Sequence[nn.Module], step: Step
) -> Unperturbed:
    """The gradients of the loss with respect to the outputs of these modules; no weight gets one.

    Args:
        model: In training.
        batches: All micro-batches of this process.
        modules: In the order in which they run.
        step: Sums over processes.
    """
    count = answered_count(batches, step)
    states, losses, gradients = [], [], []
    for batch in batches:
        states.append(perturb.randomness())
        loss, gradient = output_gradients(model, batch, modules, count)
        losses.append(loss)
        gradients.append(gradient)
    return Unperturbed(gradients, states, torch.stack(losses).sum(), count)


def second_pass(
    model: nn.Module,
    batches: Sequence[Batch],
    modules: Sequence[nn.Module],
    found: Unperturbed,
    rho: float,
    step: Step,
) -> dict[str, float]:
    """Adds the gradient of the loss under the first-order worst perturbation of these modules' outputs.

    Args:
        model: In training; only what requires a gradient gets one.
        batches: Those of the first pass.
        modules: Those of the first pass.
        found: What it found; its gradients are used up.
        rho: Joint norm of the perturbation, over all modules, micro-batches and processes.
        step: Sums over processes; runs the backward pass.

    Returns:
        The perturbed loss, the unperturbed one, and the norm of the gradient with respect to the outputs.
    """
    norm = perturb.joint_norm(found.gradients, step)
    scale = rho / (float(norm) + _GUARD)
    worst = []
    for batch, state in zip(batches, found.states, strict=True):
        addends = [part * scale for part in found.gradients.pop(0)]
        with perturb.replayed(state), perturb.perturbed(modules, addends):
            loss = answer_loss(model, batch, count=found.count)
            step.backward(loss)
        worst.append(loss.detach())
    totals = step.summed(torch.stack([torch.stack(worst).sum(), found.loss])).tolist()
    return {"loss": totals[0], "unperturbed": totals[1], "output_gradient": float(norm)}


def output_gradients(
    model: nn.Module, batch: Batch, modules: Sequence[nn.Module], count: int
) -> tuple[Tensor, list[Tensor]]:
    """The loss of a micro-batch and its gradient with respect to each module's output; no weight gets a gradient."""
    with perturb.frozen(list(model.parameters())), perturb.probed(modules) as probes:
        loss = answer_loss(model, batch, count=count)
        gradients = torch.autograd.grad(loss, probes)
    return loss.detach(), list(gradients)
