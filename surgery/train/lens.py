"""What every hidden state of a model would say if it were the last (the logit lens)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from surgery.train import blocks, perturb
from surgery.train.losses import answer_loss
from surgery.train.states import final_norm
from surgery.train.step import Batch


def lens_loss(model: nn.Module, batch: Batch, *, count: int) -> Tensor:
    """The cross-entropy of a micro-batch's answered tokens, averaged over all hidden states; summed over `count`.

    A state before the last goes through the final norm and the output head. The last one is the model's own output,
    soft caps and all. Logits are formed one state at a time, and again on the way back, so that one set is held.

    Args:
        model: In training.
        batch: A micro-batch.
        count: Answered tokens of the step, over micro-batches and processes.
    """
    found = blocks.find(model)
    norm, inner = final_norm(found), blocks.unwrapped(model)
    head: Any = inner.get_output_embeddings()  # type: ignore[operator]
    with perturb.recorded(found.layers, norm) as recorded:
        losses = [answer_loss(model, batch, count=count)]
        states = recorded[:-1]
    answered = batch.answered[:, 1:]
    targets = batch.tokens[:, 1:][answered]

    def loss(state: Tensor) -> Tensor:
        logits = head(norm(state[:, :-1][answered]))
        wide = torch.promote_types(logits.dtype, torch.float32)
        return cross_entropy(logits.to(wide), targets, reduction="sum") / count

    losses += [checkpoint(loss, state, use_reentrant=False) for state in states]
    return torch.stack(losses).mean()
