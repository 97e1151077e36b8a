"""Entropy of the next-token distribution over a vocabulary, without storing the logits.

For a hidden state h and output weights W, with logits z = W h and p = softmax(z),

    H = -sum_j p_j log p_j = log s - u / s,    s = sum_j exp(z_j - c),    u = sum_j (z_j - c) exp(z_j - c)

for any c. With c the largest logit both terms of H are at least 0 (u <= 0 and s >= 1), so nothing cancels however
large the logits are. s and u are gathered chunk by chunk: when the largest logit so far grows from c to c', with
d = c - c' <= 0,

    s' = exp(d) s,    u' = exp(d) (u + d s)

Backward: dp_i/dz_j = p_i (delta_ij - p_j), and the sum over i of dp_i/dz_j is 0, so from H = -sum_i p_i log p_i

    dH/dz_j = -sum_i dp_i/dz_j log p_i = -p_j (log p_j - sum_i p_i log p_i) = -p_j (y_j - m)

with y_j = z_j - c and m = u / s, their mean under p (log p_j = y_j - log s; the constant drops out). The logits are
computed again, chunk by chunk, and with G_tj = dL/dH_t dH_t/dz_tj

    dL/dh = G W,    dL/dW = G^T h

Memory beside arguments and gradients: `hidden` in float32, 2^22 logits (256 a token if that is more) and what is made
of them. All arithmetic is float32, float64 for float64 arguments, also under autocast; gradients are rounded once.

TAR (Tamirisa et al., "Tamper-Resistant Safeguards for Open-Weight LLMs", ICLR 2025,
https://arxiv.org/abs/2408.00761) raises this entropy on harmful text: its loss is minus the mean over all tokens,
prompt and padding with them. Give a mask to leave tokens out.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from surgery.errors import UsageError
from surgery.kernels.backend import choose

# Logits held at a time, and the fewest columns of them: fewer would make slow products.
_LOGITS, _LEAST = 1 << 22, 256


class Sums(NamedTuple):
    """Largest logit c, and s and u relative to it, of one token over some of the vocabulary."""

    largest: Float[Tensor, "*tokens"]
    total: Float[Tensor, "*tokens"]
    moment: Float[Tensor, "*tokens"]


def vocabulary_entropy(
    hidden: Float[Tensor, "tokens d"],
    weight: Float[Tensor, "vocabulary d"],
    mask: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """The mean entropy in nats of `softmax(hidden @ weight^T)`, from 0 to log(vocabulary); 0 for no tokens.

    Differentiable once in `hidden` and `weight`.

    Args:
        hidden: Last hidden states, after the final norm.
        weight: The output embedding, in the dtype of `hidden`.
        mask: Tokens to count, all by default. What the others hold plays no part, be it NaN.

    Raises:
        UsageError: Shapes or dtypes do not fit, or the backend asked for cannot compute this.
    """
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != hidden.shape[:1]:
            raise UsageError(
                f"the mask is {mask.dtype} of shape {tuple(mask.shape)} for hidden states of shape "
                f"{tuple(hidden.shape)}; one bool a token is needed."
            )
        hidden = hidden[mask]
    return token_entropy(hidden, weight).sum() / max(1, len(hidden))


def token_entropy(
    hidden: Float[Tensor, "tokens d"], weight: Float[Tensor, "vocabulary d"]
) -> Float[Tensor, " tokens"]:
    """The entropy in nats of every token's `softmax(hidden @ weight^T)`, float32 (float64 for float64 arguments).

    Differentiable once in `hidden` and `weight`.

    Raises:
        UsageError: Shapes or dtypes do not fit, or the backend asked for cannot compute this.
    """
    _check(hidden, weight)
    return _Entropy.apply(hidden, weight)


class _Entropy(torch.autograd.Function):
    """The entropy of every token, with its gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            sums = _sums(hidden, weight)
        ctx.save_for_backward(hidden, weight, *sums)
        return sums.total.log() - sums.moment / sums.total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def]
        hidden, weight, *sums = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            return _gradients(hidden, weight, Sums(*sums), upstream, ctx.needs_input_grad)


def _sums(hidden: Tensor, weight: Tensor) -> Sums:
    """c, s and u of every token over the whole vocabulary."""
    if choose(hidden, weight) == "triton":
        from surgery.kernels import vocabulary_entropy_triton

        return joined(Sums(*vocabulary_entropy_triton.sums(hidden, weight)))
    wide = _wide(hidden)
    states = hidden.to(wide)
    start = torch.full(hidden.shape[:1], torch.finfo(wide).min, dtype=wide, device=hidden.device)
    known = Sums(start, torch.zeros_like(start), torch.zeros_like(start))
    for rows in _chunks(hidden, weight):
        logits = states @ weight[rows].to(wide).T
        largest = logits.amax(-1)
        shifted = logits.sub_(rearrange(largest, "tokens -> tokens 1"))
        shares = shifted.exp()
        found = Sums(largest, shares.sum(-1), torch.linalg.vecdot(shares, shifted))
        known = joined(Sums(*(torch.stack(pair, -1) for pair in zip(known, found, strict=True))))
    return known


def joined(parts: Sums) -> Sums:
    """The sums over parts of a vocabulary, made one; the parts are the last axis."""
    largest = parts.largest.amax(-1, keepdim=True)
    moved = parts.largest - largest
    scale = moved.exp()
    total = (scale * parts.total).sum(-1)
    return Sums(largest.squeeze(-1), total, (scale * (parts.moment + moved * parts.total)).sum(-1))


def _gradients(
    hidden: Tensor, weight: Tensor, sums: Sums, upstream: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients with respect to `hidden` and `weight`, each None if it is not needed."""
    wide = sums.total.dtype
    to_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if needed[0] else None
    to_weight = torch.empty_like(weight) if needed[1] else None
    states = hidden.to(wide)
    for rows in _chunks(hidden, weight):
        gradient = _logit_gradient(hidden, weight[rows], sums, upstream.to(wide))
        if to_hidden is not None:
            to_hidden.addmm_(gradient, weight[rows].to(wide))
        if to_weight is not None:
            to_weight[rows] = gradient.T @ states
    return None if to_hidden is None else to_hidden.to(hidden.dtype), to_weight


def _logit_gradient(hidden: Tensor, weight: Tensor, sums: Sums, upstream: Tensor) -> Tensor:
    """G for some of the vocabulary: what a unit of each logit adds to the loss."""
    if choose(hidden, weight) == "triton":
        from surgery.kernels import vocabulary_entropy_triton

        return vocabulary_entropy_triton.logit_gradient(hidden, weight, *sums, upstream)
    largest, total, moment = (rearrange(part, "tokens -> tokens 1") for part in sums)
    wide = total.dtype
    shifted = (hidden.to(wide) @ weight.to(wide).T).sub_(largest)
    shares = (shifted - total.log()).exp_().mul_(rearrange(-upstream, "tokens -> tokens 1"))
    return shifted.sub_(moment / total).mul_(shares)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Runs of the vocabulary: by a rule of the shapes alone, so that results do not depend on the machine."""
    size = max(_LEAST, _LOGITS // max(1, len(hidden)))
    for begin in range(0, len(weight), size):
        yield slice(begin, begin + size)


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _check(hidden: Tensor, weight: Tensor) -> None:
    """Refuse what does not fit."""
    shapes = f"the hidden states have shape {tuple(hidden.shape)} and the weight {tuple(weight.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.numel():
        raise UsageError(
            f"{shapes}; (tokens, d) and (vocabulary, d) are needed, neither empty but for tokens."
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise UsageError(
            f"the hidden states are {hidden.dtype} and the weight is {weight.dtype}; "
            "one floating-point dtype is needed. Convert one of them."
        )
