"""How likely a model finds given answers: deterministic, and no answer has to be written."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from surgery.train.feed import padded
from surgery.train.losses import answer_logits
from surgery.train.tokens import Example

# A batch of at least so many rows ends before one that is longer than its shortest by more than this factor: what is
# computed of padding is lost, and so is what a small batch leaves idle.
_FEW, _LONGER = 8, 1.1


@torch.no_grad()
def row_losses(
    model: nn.Module, examples: Sequence[Example], *, pad: int = 0, batch_size: int = 64
) -> list[tuple[float, int]]:
    """The cross-entropy of each row's response in nats, summed over its tokens, and how many those are.

    Args:
        model: A causal language model in eval mode.
        examples: Tokenised rows.
        pad: The id of padding; no result depends on it.
        batch_size: Rows looked at together, at most; rows of like length go together.

    Returns:
        For each row, in order, the sum of -log p(token | what comes before it) over its answered tokens in float64,
        and their number.
    """
    device = next(model.parameters()).device
    found = [(0.0, 0)] * len(examples)
    for places in _alike([len(example.tokens) for example in examples], batch_size):
        batch = padded([examples[place] for place in places], pad, device)
        logits, targets, chosen = answer_logits(model, batch)
        losses = cross_entropy(logits, targets, reduction="none").double()
        rows = chosen.nonzero()[:, 0]
        sums: Tensor = losses.new_zeros(len(places)).index_add_(0, rows, losses)
        counts = rows.bincount(minlength=len(places))
        for place, total, count in zip(places, sums.tolist(), counts.tolist(), strict=True):
            found[place] = (total, count)
    return found


def _alike(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """The places of rows in batches of at most `most`, short rows first."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        longer = len(batch) >= _FEW and lengths[place] > _LONGER * lengths[batch[0]]
        if len(batch) == most or longer:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
