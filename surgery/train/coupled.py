"""Losses that couple all micro-batches of a step through tensors that each of them gives."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from surgery.train import perturb
from surgery.train.step import Batch, Step

Given = Sequence[Tensor]
"""What a micro-batch gives beside its own loss."""


def backward(
    batches: Sequence[Batch],
    run: Callable[[Batch], tuple[Tensor, Given]],
    couple: Callable[[Sequence[Given]], Sequence[Given]],
    step: Step,
) -> Tensor:
    """Adds the gradient of every micro-batch's own loss and of a function of what all of them give.

    A single micro-batch is run once. Several are run twice, with equal random numbers: how the function changes with
    what one gives depends on all, and the graphs of all need not be held at once.

    Args:
        batches: All micro-batches of this process.
        run: Runs the model on one; its own loss, and what it gives.
        couple: From what each of them gave, without history, the derivatives of the function with respect to it.
        step: Runs the backward pass.

    Returns:
        The sum of this process's own losses, in float64.
    """
    once = len(batches) == 1
    begun, losses, given = [], [], []
    for batch in batches:
        begun.append(perturb.randomness())
        with torch.set_grad_enabled(once):
            loss, parts = run(batch)
        losses.append(loss)
        given.append(parts)
    slopes = couple([[part.detach() for part in parts] for parts in given])
    for number, batch in enumerate(batches):
        if once:
            step.backward(losses[0] + _pulled(given[0], slopes[0]))
            continue
        with perturb.replayed(begun[number]):
            loss, parts = run(batch)
            step.backward(loss + _pulled(parts, slopes[number]))
    return torch.stack([loss.detach().double() for loss in losses]).sum()


def _pulled(given: Given, slopes: Given) -> Tensor:
    """A scalar whose derivative with respect to each tensor is its slope."""
    parts = []
    for tensor, slope in zip(given, slopes, strict=True):
        wide = torch.promote_types(tensor.dtype, torch.float32)
        parts.append((tensor.to(wide) * slope.to(wide)).sum())
    return torch.stack(parts).sum()
