"""Harmful losses with an upper bound, to be raised: cross-entropy itself can be raised without end.

`clamped` is the cross-entropy of each answered token up to log V, that of knowing nothing; beyond it the gradient is
0. `entropy` is that of the next token at those places. `calibrated` is the cross-entropy of label tokens alone after
the best recalibration of their logits (MLAC's), which no exchange of labels can raise.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from surgery.errors import InputError
from surgery.train.calibration import calibration
from surgery.train.losses import answer_logits
from surgery.train.step import Batch, Step

Bound = Literal["calibrated", "entropy", "clamped"]
Measure = Callable[[Callable[..., Any]], Tensor]
"""Of a model, or of a call that is one at other weights: this process's part of the loss, with its graph."""


def per_token(logits: Tensor, targets: Tensor, bound: Bound) -> Tensor:
    """The bounded loss of each token, in nats, from 0 to log V."""
    if bound == "entropy":
        logs = logits.log_softmax(-1)
        return -(logs.exp() * logs).sum(-1)
    return cross_entropy(logits, targets, reduction="none").clamp(
        max=torch.tensor(logits.shape[-1]).log().item()
    )


def token_loss(batches: Sequence[Batch], bound: Bound, count: int) -> list[Measure]:
    """For each micro-batch, the bounded losses of its answered tokens, summed over `count`."""

    def of(batch: Batch) -> Measure:
        def measure(model: Callable[..., Any]) -> Tensor:
            logits, targets, _ = answer_logits(model, batch)
            return per_token(logits, targets, bound).sum() / count

        return measure

    return [of(batch) for batch in batches]


def label_logits(
    model: Callable[..., Any], batches: Sequence[Batch], labels: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Logits of the label tokens where the answer has one of them, and which one it is, over all micro-batches."""
    kept = torch.tensor(labels, device=batches[0].tokens.device)
    found = []
    for batch in batches:
        logits, targets, _ = answer_logits(model, batch)
        which = (targets[:, None] == kept).int()
        rows = which.any(-1)
        found.append((logits[rows][:, kept], which[rows].argmax(-1)))
    logits, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not len(targets):
        raise InputError(
            f"no harmful answer of this batch has one of the label tokens {', '.join(map(str, labels))}; name tokens "
            "that answers have by --labels, or raise --batch-size"
        )
    return logits, targets


def label_loss(batches: Sequence[Batch], labels: Sequence[int]) -> Measure:
    """The calibrated loss of label tokens over all micro-batches, from 0 to log of the number of labels."""

    def measure(model: Callable[..., Any]) -> Tensor:
        logits, targets = label_logits(model, batches, labels)
        # By the envelope theorem the best recalibration counts as a constant in the derivative.
        best = calibration(logits.detach(), targets).weights.to(logits)
        return cross_entropy(logits @ best, targets)

    return measure


def processes(step: Step, device: torch.device) -> int:
    """How many processes train together."""
    return int(step.summed(torch.ones((), device=device)))
