"""The training loop of the recipe: plain torch, loss on the answers only."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from surgery.demo.corpus import Row
from surgery.demo.tokenizer import END, chat

IGNORED = -100
"""The label of tokens that carry no loss."""

Example = tuple[list[int], list[int]]


def examples(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> list[Example]:
    """Token ids and labels of every row: the chat text of the prompt, then the response and the end token."""
    made = []
    for row in rows:
        prompt = tokenizer.encode(chat(row["prompt"]), add_special_tokens=False)
        answer = tokenizer.encode(row["response"] + END, add_special_tokens=False)
        made.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    return made


def batches(rows: Sequence[Example], size: int, pad: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches of ids and labels, both int64 `(size, longest)`, right-padded."""
    order = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(len(rows), generator=order).tolist()
        chosen, waiting = [rows[i] for i in waiting[:size]], waiting[size:]
        longest = max(len(ids) for ids, _ in chosen)
        yield (
            torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in chosen]),
            torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in chosen]),
        )


def fit(
    model: Module,
    source: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    peak: float,
    warmup: int = 20,
    decay: float = 0.0,
    where: Callable[[], AbstractContextManager[None]] = nullcontext,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train every parameter that requires a gradient for `steps` batches; returns nothing.

    AdamW, learning rate `peak` after `warmup` steps and a cosine to a tenth of it, weight decay `decay`,
    gradients clipped to norm 1 and taken inside `where()`; `after_step` is called with the number of steps done.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=peak, weight_decay=decay, betas=(0.9, 0.99))
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = peak * _schedule(step, steps, warmup)
        with where():
            torch.autograd.backward(loss(model, *next(source)))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        after_step(step + 1)
    model.eval()


def loss(model: Module, ids: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy, in nats per answer token, of int64 `ids` and `labels`, both `(batch, length)`."""
    # Padding lies to the right and carries no loss, so a causal model needs no attention mask.
    logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def _schedule(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
