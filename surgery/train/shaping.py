"""Hidden states whose second moments a loss is taken of, over all micro-batches of a step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.conditioning.regularisers import Kind
from surgery.train import perturb
from surgery.train.moments import moments
from surgery.train.step import Batch, Step


@dataclass(frozen=True)
class Shape:
    """What second moments are to become.

    Attributes:
        kind: The regulariser.
        weight: What it is multiplied by.
        centred: Whether the mean of the states is taken off first.
    """

    kind: Kind
    weight: float
    centred: bool


@dataclass(frozen=True)
class Shaped:
    """What one step found.

    Attributes:
        loss: This process's sum of what the micro-batches' own loss was, in float64.
        value: The regulariser, averaged over modules.
        kappa: The largest condition number of a module's moments.
    """

    loss: Tensor
    value: float
    kappa: float


def shape(
    batches: Sequence[Batch],
    run: Callable[[Batch], Tensor],
    modules: Sequence[nn.Module],
    wanted: Shape,
    step: Step,
) -> Shaped:
    """Adds the gradient of what `run` gives, and of the weighted regulariser averaged over modules.

    The moments are those of what the modules put out on answered tokens. What changes them depends on every
    micro-batch: a single one is run once, several are run twice, with equal random numbers.

    Args:
        batches: All micro-batches of this process.
        run: Runs the model on one and gives a loss of its own.
        modules: Blocks of the model.
        wanted: The regulariser.
        step: Adds up over processes; runs the backward pass.
    """
    once = len(batches) == 1
    with perturb.outputs(modules) as put_out:

        def states(batch: Batch) -> list[Tensor]:
            return [put_out[module][batch.answered] for module in modules]

        begun, losses, seen = [], [], []
        for batch in batches:
            begun.append(perturb.randomness())
            with torch.set_grad_enabled(once):
                losses.append(run(batch))
                seen.append(states(batch))
        found = [moments(torch.cat(parts), step, centred=wanted.centred) for parts in zip(*seen, strict=True)]
        values, pulls = zip(*(one.regulariser(wanted.kind) for one in found), strict=True)
        slopes = list(zip(*(pull.split([len(part[0]) for part in seen]) for pull in pulls), strict=True))
        for number, batch in enumerate(batches):
            if once:
                step.backward(losses[0] + _pulled(seen[0], slopes[0], wanted.weight))
                continue
            with perturb.replayed(begun[number]):
                loss = run(batch)
            step.backward(loss + _pulled(states(batch), slopes[number], wanted.weight))
    return Shaped(
        torch.stack([loss.detach().double() for loss in losses]).sum(),
        sum(values) / len(modules),
        max(one.kappa for one in found),
    )


def _pulled(states: Sequence[Tensor], slopes: Sequence[Tensor], weight: float) -> Tensor:
    """A scalar whose derivative with respect to a module's states is `weight` times its slopes, over all of them."""
    parts = []
    for state, slope in zip(states, slopes, strict=True):
        wide = torch.promote_types(state.dtype, torch.float32)
        parts.append((state.to(wide) * slope.to(wide)).sum())
    return weight / len(parts) * torch.stack(parts).sum()
