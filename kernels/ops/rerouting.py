"""Circuit Breakers' rerouting loss: how far hidden states still point where they used to.

For hidden states a of the model in training and b of the original one, at some layers l and tokens t of a batch,

    c_lt = a_lt . b_lt / (|a_lt| |b_lt|),    loss = sum_{l, t counted} max(0, c_lt) / (layers * tokens counted)

(L_s of Zou et al., "Improving Alignment and Robustness with Circuit Breakers", NeurIPS 2024,
https://arxiv.org/abs/2406.04313, Algorithm 1: the maximum is taken token by token, before the mean.) Backward, where
c_lt > 0,

    dc/da = (b / |b| - c a / |a|) / |a|

and 0 elsewhere; at c = 0 the subgradient 0 is taken. b gets no gradient.

Where the authors' code divides by the norm as it is, a vector of norm 0 gives NaN, and since it masks after the
division a masked one does too. Here a norm below the smallest normal number of the arithmetic counts as zero: cosine
and gradient are 0; what is not counted is not looked at. Vectors are divided by their largest entry before they are
squared, so that the cosine depends on directions alone from the smallest normal number to the largest.

All is float32 (float64 for float64 hidden states), a few rows at a time; the gradient is rounded once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from surgery.errors import UsageError
from surgery.kernels.backend import choose

# Entries of the hidden states taken to float32 at a time.
_ENTRIES = 1 << 20


class Cosines(NamedTuple):
    """What the gradient needs of every token: 0 in all three where it is not counted or a norm is zero."""

    cosine: Float[Tensor, "layers batch tokens"]
    norm: Float[Tensor, "layers batch tokens"]
    original_norm: Float[Tensor, "layers batch tokens"]


def rerouting_loss(
    hidden: Float[Tensor, "layers batch tokens d"],
    original: Float[Tensor, "layers batch tokens d"],
    mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """The mean of `max(0, cos(hidden, original))` over layers and counted tokens, from 0 to 1; 0 if none is counted.

    Differentiable once, in `hidden` alone.

    Args:
        hidden: Hidden states of the model in training, at the layers to reroute.
        original: Those of the model as it was, in any dtype.
        mask: Tokens to count. What the others hold plays no part, be it NaN.

    Raises:
        UsageError: Shapes or dtypes do not fit, or the backend asked for cannot compute this.
    """
    _check(hidden, original, mask)
    cosine = _Cosine.apply(hidden, original.detach(), mask)
    counted = mask.sum().clamp_min(1) * max(1, len(hidden))
    return torch.relu(cosine).sum() / counted


class _Cosine(torch.autograd.Function):
    """The cosine of every counted token, 0 for the others."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, original: Tensor, mask: Tensor) -> Tensor:
        cosines = _cosines(hidden, original, mask)
        ctx.save_for_backward(hidden, original, *cosines)
        return cosines.cosine

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        hidden, original, *cosines = ctx.saved_tensors
        return _gradient(hidden, original, Cosines(*cosines), upstream), None, None


def _cosines(hidden: Tensor, original: Tensor, mask: Tensor) -> Cosines:
    """Cosine and norms of every counted token."""
    if choose(hidden, original, mask) == "triton":
        from surgery.kernels import rerouting_triton

        return Cosines(*rerouting_triton.cosines(hidden, original, mask))
    wide = _wide(hidden)
    found = Cosines(*torch.zeros(3, *hidden.shape[:3], dtype=wide, device=hidden.device))
    counted = repeat(mask, "batch tokens -> (layers batch) tokens", layers=len(hidden))
    states, references, outputs = _rows(hidden), _rows(original), [_rows(part) for part in found]
    for at in _pieces(hidden):
        values = _cosine_and_norms(states[at].to(wide), references[at].to(wide))
        for output, value in zip(outputs, values, strict=True):
            output[at] = torch.where(counted[at], value, 0.0)
    return found


def _cosine_and_norms(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine and both norms along the last axis; all are 0 where a norm is."""
    (ours, our_norm), (theirs, their_norm) = _unit(ours), _unit(theirs)
    tiny = torch.finfo(our_norm.dtype).tiny
    nothing = (our_norm < tiny) | (their_norm < tiny)
    values = ((ours * theirs).sum(-1), our_norm, their_norm)
    cosine, our_norm, their_norm = (value.masked_fill(nothing, 0.0) for value in values)
    return cosine, our_norm, their_norm


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of length 1 (or 0), and the lengths they had."""
    largest = vectors.abs().amax(-1, keepdim=True)
    scaled = vectors / largest.masked_fill(largest == 0, 1.0)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / length.masked_fill(length == 0, 1.0), (length * largest).squeeze(-1)


def _gradient(hidden: Tensor, original: Tensor, cosines: Cosines, upstream: Tensor) -> Tensor:
    """The gradient with respect to `hidden` for that with respect to the cosines."""
    if choose(hidden, original) == "triton":
        from surgery.kernels import rerouting_triton

        return rerouting_triton.gradient(hidden, original, *cosines, upstream)
    wide = cosines.cosine.dtype
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    states, references, target = _rows(hidden), _rows(original), _rows(out)
    known = [rearrange(_rows(part), "rows tokens -> rows tokens 1") for part in (*cosines, upstream.to(wide))]
    for at in _pieces(hidden):
        cosine, norm, original_norm, factor = (part[at] for part in known)
        along = states[at].to(wide) / norm * cosine
        turned = (references[at].to(wide) / original_norm).sub_(along).mul_(factor).div_(norm)
        target[at] = turned.masked_fill_(norm == 0, 0.0).to(hidden.dtype)
    return out


def _rows(states: Tensor) -> Tensor:
    """Layers and batch as one axis."""
    return rearrange(states, "layers batch ... -> (layers batch) ...")


def _pieces(hidden: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of layers and batch, and tokens of them, that are worked on together."""
    layers, batch, tokens, d = hidden.shape
    some = max(1, min(tokens, _ENTRIES // max(1, d)))
    rows = max(1, _ENTRIES // max(1, some * d))
    for row in range(0, layers * batch, rows):
        for token in range(0, tokens, some):
            yield slice(row, row + rows), slice(token, token + some)


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _check(hidden: Tensor, original: Tensor, mask: Tensor) -> None:
    """Refuse what does not fit."""
    if hidden.dim() != 4 or hidden.shape != original.shape:
        raise UsageError(
            f"the hidden states have shapes {tuple(hidden.shape)} and {tuple(original.shape)}; two equal stacks "
            "(layers, batch, tokens, d) are needed. Stack those of the layers to reroute."
        )
    if mask.dtype != torch.bool or mask.shape != hidden.shape[1:3]:
        raise UsageError(
            f"the mask is {mask.dtype} of shape {tuple(mask.shape)} for hidden states of shape "
            f"{tuple(hidden.shape)}; one bool for each token of the batch is needed."
        )
    if not hidden.is_floating_point() or not original.is_floating_point():
        raise UsageError(
            f"the hidden states are {hidden.dtype} and {original.dtype}; floating point is needed."
        )
