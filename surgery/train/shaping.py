"""Hidden states whose second moments a loss is taken of, over all micro-batches of a step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.conditioning.regularisers import Kind
from surgery.train import coupled, perturb
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

    The moments are those of what the modules put out on answered tokens.

    Args:
        batches: All micro-batches of this process.
        run: Runs the model on one and gives a loss of its own.
        modules: Blocks of the model.
        wanted: The regulariser.
        step: Adds up over processes; runs the backward pass.
    """
    values: list[float] = []
    kappas: list[float] = []

    def couple(given: Sequence[coupled.Given]) -> Sequence[coupled.Given]:
        sizes, slopes = [len(parts[0]) for parts in given], []
        for parts in zip(*given, strict=True):
            found = moments(torch.cat(parts), step, centred=wanted.centred)
            value, pull = found.regulariser(wanted.kind)
            values.append(value)
            kappas.append(found.kappa)
            slopes.append((wanted.weight / len(modules) * pull).split(sizes))
        return list(zip(*slopes, strict=True))

    with perturb.outputs(modules) as put_out:

        def seen(batch: Batch) -> tuple[Tensor, coupled.Given]:
            loss = run(batch)
            return loss, [put_out[module][batch.answered] for module in modules]

        loss = coupled.backward(batches, seen, couple, step)
    return Shaped(loss, sum(values) / len(values), max(kappas))
