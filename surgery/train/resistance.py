"""Losses of resistance: low where a model that was attacked is still of no use on harmful rows.

Each is made for the rows of one attack, then asked again and again while the attack goes on.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from surgery.train.entropy import Where, counted, entropies
from surgery.train.preference import log_likelihoods, preference_losses
from surgery.train.step import Batch, Step

Measure = Callable[[float], Tensor]
"""Adds the gradient of a multiple of the loss; gives this process's part of the loss itself, in float64."""


def minus_entropy(model: nn.Module, batches: Sequence[Batch], where: Where, step: Step) -> Measure:
    """Minus the mean entropy of the next token, over all micro-batches and processes; at least -log V.

    Args:
        model: Under attack.
        batches: Harmful rows that no attacker sees.
        where: The positions that count.
        step: Adds up over processes.
    """
    masks = [counted(batch, where) for batch in batches]
    count = max(1, int(step.summed(torch.stack([mask.sum() for mask in masks]).sum())))

    def measure(scale: float) -> Tensor:
        parts = []
        for batch, mask in zip(batches, masks, strict=True):
            part = -entropies(model, batch)[mask].sum() / count
            step.backward(scale * part)
            parts.append(part.detach().double())
        return torch.stack(parts).sum()

    return measure


def preference(
    model: nn.Module, preferred: Sequence[Batch], dispreferred: Sequence[Batch], beta: float, step: Step
) -> Measure:
    """The mean DPO loss of refusals against harmful answers; the reference is the model as the run began.

    Args:
        model: Not attacked yet.
        preferred: Refusals.
        dispreferred: Harmful answers to the same prompts, row by row.
        beta: Strength of the preference.
        step: Adds up over processes, and knows the model as it was.
    """
    both = list(zip(preferred, dispreferred, strict=True))
    count = int(
        step.summed(torch.tensor(sum(len(one.tokens) for one in preferred), device=both[0][0].tokens.device))
    )
    with torch.no_grad(), step.original():
        reference = [(log_likelihoods(model, one), log_likelihoods(model, other)) for one, other in both]

    def measure(scale: float) -> Tensor:
        parts = []
        for (chosen, rejected), known in zip(both, reference, strict=True):
            likely, unlikely = log_likelihoods(model, chosen), log_likelihoods(model, rejected)
            part = preference_losses(likely, unlikely, *known, beta).sum() / count
            step.backward(scale * part)
            parts.append(part.detach().double())
        return torch.stack(parts).sum()

    return measure
