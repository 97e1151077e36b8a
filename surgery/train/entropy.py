"""The entropy of a model's next-token distributions, for training, without storing logits if it can be helped.

The fused op needs to be between the last hidden state and the output weights, so it takes the place of the output
head for one forward pass: what the model then returns as logits are entropies. A model that does more to its logits
after the head (a soft cap, a scale) or has a bias there is seen to, and its logits are formed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from surgery.kernels.vocabulary_entropy import token_entropy
from surgery.train import blocks
from surgery.train.step import Batch

Where = Literal["all", "attended", "answered"]


def counted(batch: Batch, where: Where) -> Tensor:
    """Which positions of a micro-batch count: all with the padding, tokens alone, or those of the responses."""
    if where == "all":
        return torch.ones_like(batch.attended)
    return batch.attended if where == "attended" else batch.answered


def entropies(model: nn.Module, batch: Batch) -> Float[Tensor, "rows length"]:
    """The entropy in nats of what follows each position, in float32 or wider, with its gradient."""
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.attended, "use_cache": False}
    head = blocks.unwrapped(model).get_output_embeddings()  # type: ignore[operator]
    if type(head) is nn.Linear and head.bias is None:
        with _fused(head) as made:
            found = model(**inputs).logits
        if found is made[-1]:
            return found.squeeze(-1)
    logits = model(**inputs).logits
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    # Where a probability is 0 its logarithm is not finite, and it adds nothing.
    return -(logs.exp() * logs.clamp_min(torch.finfo(logs.dtype).min)).sum(-1)


@contextmanager
def _fused(head: nn.Linear) -> Iterator[list[Tensor]]:
    """The output head giving entropies, of shape (rows, length, 1), for a forward pass; lists what it gave."""
    made: list[Tensor] = []

    def forward(hidden: Tensor) -> Any:
        weight = head.weight.to(hidden.dtype)
        made.append(token_entropy(hidden.flatten(0, -2), weight).view(*hidden.shape[:-1], 1))
        return made[-1]

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield made
    finally:
        del head.forward
