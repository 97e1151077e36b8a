"""Losses over the answered tokens of a whole step: sums over micro-batches and processes, divided once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from surgery.train.step import Batch, Step


def answered_count(batches: Sequence[Batch], step: Step) -> int:
    """How many tokens of a step are answered, over all its micro-batches and all processes.

    A row's first token is predicted from nothing and does not count. A loss that is summed and divided by this does
    not depend on how the rows were spread.
    """
    own = sum((batch.answered[:, 1:].sum() for batch in batches), torch.zeros((), dtype=torch.int64))
    return int(step.summed(own.to(batches[0].tokens.device) if batches else own))


def answer_logits(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What predicts a micro-batch's answered tokens, and where those are.

    Returns:
        Logits of shape (answered, vocabulary) in float32 or wider, the tokens they are to predict, and a mask of the
        rows by which entry belongs to which row.
    """
    answered = batch.answered[:, 1:]
    # Logits of a whole vocabulary are the largest tensors of a small model: none where no row has an answer.
    places = answered.any(0).nonzero().flatten()
    chosen = answered[:, places]
    logits = model(
        input_ids=batch.tokens, attention_mask=batch.attended, use_cache=False, logits_to_keep=places
    ).logits[chosen]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide), batch.tokens[:, 1:][:, places][chosen], chosen


def answer_loss(model: Callable[..., Any], batch: Batch, *, count: int) -> Tensor:
    """The cross-entropy of a micro-batch's answered tokens, summed in float32 or wider over `count`; a scalar.

    Added up over the micro-batches and processes of a step, with `count` from `answered_count`, these are the mean
    over all answered tokens of the step, in nats.
    """
    logits, targets, _ = answer_logits(model, batch)
    return cross_entropy(logits, targets, reduction="sum") / count
