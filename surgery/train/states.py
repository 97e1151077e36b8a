"""The hidden states of a model, and how far they are from others."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surgery.errors import InputError
from surgery.train import blocks, perturb
from surgery.train.step import Batch

States = Sequence[Tensor]
"""Embeddings, what each block puts out, and what the final norm makes of the last, as transformers counts them."""


def distance(
    now: States, before: States, attended: Tensor, *, squared: bool, relative: bool = False
) -> Tensor:
    """The sum over attended tokens of ||now - before|| (or its square), averaged over all hidden states.

    In float32 or wider; at a distance of 0 the gradient is 0. If relative, each is divided by ||before|| (or its
    square) where that is not 0.
    """
    total = torch.zeros((), dtype=torch.float64, device=attended.device)
    for ours, theirs in zip(now, before, strict=True):
        wide = torch.promote_types(ours.dtype, torch.float32)
        apart = ours[attended].to(wide) - theirs[attended].to(wide)
        each = _size(apart, squared)
        if relative:
            unit = _size(theirs[attended].to(wide), squared)
            each = each / torch.where(unit > 0, unit, 1)
        total = total + each.sum()
    return total / len(now)


def _size(vectors: Tensor, squared: bool) -> Tensor:
    return vectors.square().sum(-1) if squared else torch.linalg.vector_norm(vectors, dim=-1)


def hidden_states(model: nn.Module, found: blocks.Blocks, batch: Batch) -> list[Tensor]:
    """The hidden states of a micro-batch as transformers counts them, of the blocks the model has now."""
    layers = list(getattr(found.stack, found.list_name))
    with perturb.recorded(layers, final_norm(found)) as states:
        # One position for the output head: nothing here is read from it.
        model(input_ids=batch.tokens, attention_mask=batch.attended, use_cache=False, logits_to_keep=1)
    return states


def final_norm(found: blocks.Blocks) -> nn.Module:
    """The norm whose output is the last hidden state.

    Raises:
        InputError: The decoder has none.
    """
    if found.final_norm is None:
        raise InputError(
            f"{type(found.stack).__name__} has no one norm after its blocks; it is needed as the last "
            "hidden state: this architecture cannot be trained by this method"
        )
    return found.final_norm
