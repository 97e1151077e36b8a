"""Triton twin of `rerouting`: one program has a few tokens and goes through their entries block by block.

Tokens are numbered (layer, batch, token), the last fastest. Rows that are not counted are not read.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

_BR, _BD = 16, 128
# The smallest normal float32: a norm below it counts as zero.
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
@no_type_check
def _place(row, batch, tokens, s_layer, s_batch, s_token):
    """Where a row begins in a strided (layers, batch, tokens, d) tensor."""
    rest = row // tokens
    return (rest // batch) * s_layer + (rest % batch) * s_batch + (row % tokens) * s_token


@triton.jit
@no_type_check
def _cosines(
    a, b, mask, cosine, norm, original_norm, rows, batch, tokens, d,
    a_layer, a_batch, a_token, a_col, b_layer, b_batch, b_token, b_col,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Cosine and norms of a block of rows, in two looks: the largest entries first, then what is divided by them."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    counted = row < rows
    counted = counted & (tl.load(mask + row % (batch * tokens), mask=counted, other=0) != 0)
    ours = a + _place(row, batch, tokens, a_layer, a_batch, a_token)
    theirs = b + _place(row, batch, tokens, b_layer, b_batch, b_token)
    our_largest = tl.zeros((BR,), tl.float32)
    their_largest = tl.zeros((BR,), tl.float32)
    for start in range(0, d, BD):
        cols = start + tl.arange(0, BD).to(tl.int64)
        inside = counted[:, None] & (cols[None, :] < d)
        x = tl.load(ours[:, None] + cols[None, :] * a_col, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(theirs[:, None] + cols[None, :] * b_col, mask=inside, other=0.0).to(tl.float32)
        our_largest = tl.maximum(our_largest, tl.max(tl.abs(x), axis=1))
        their_largest = tl.maximum(their_largest, tl.max(tl.abs(y), axis=1))
    # NaN need not survive a maximum, but it does survive the sums.
    our_scale = tl.where(our_largest == 0, 1.0, our_largest)[:, None]
    their_scale = tl.where(their_largest == 0, 1.0, their_largest)[:, None]
    xx, yy, xy = tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.float32)
    for start in range(0, d, BD):
        cols = start + tl.arange(0, BD).to(tl.int64)
        inside = counted[:, None] & (cols[None, :] < d)
        x = tl.load(ours[:, None] + cols[None, :] * a_col, mask=inside, other=0.0).to(tl.float32) / our_scale
        y = (
            tl.load(theirs[:, None] + cols[None, :] * b_col, mask=inside, other=0.0).to(tl.float32)
            / their_scale
        )
        xx += tl.sum(x * x, axis=1)
        yy += tl.sum(y * y, axis=1)
        xy += tl.sum(x * y, axis=1)
    our_length, their_length = tl.sqrt(xx), tl.sqrt(yy)
    our_norm, their_norm = our_length * our_largest, their_length * their_largest
    nothing = (our_norm < _TINY) | (their_norm < _TINY)
    found = xy / tl.where(nothing, 1.0, our_length * their_length)
    tl.store(cosine + row, tl.where(nothing, 0.0, found), mask=row < rows)
    tl.store(norm + row, tl.where(nothing, 0.0, our_norm), mask=row < rows)
    tl.store(original_norm + row, tl.where(nothing, 0.0, their_norm), mask=row < rows)


@triton.jit
@no_type_check
def _gradient(
    a, b, cosine, norm, original_norm, upstream, out, rows, batch, tokens, d,
    a_layer, a_batch, a_token, a_col, b_layer, b_batch, b_token, b_col,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A block [BR, BD] of the gradient; out is contiguous."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    cols = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    there = row < rows
    c = tl.load(cosine + row, mask=there, other=0.0)[:, None]
    our_norm = tl.load(norm + row, mask=there, other=0.0)
    their_norm = tl.load(original_norm + row, mask=there, other=0.0)
    g = tl.load(upstream + row, mask=there, other=0.0)[:, None]
    counted = there & (our_norm != 0)
    our_norm = tl.where(counted, our_norm, 1.0)[:, None]
    their_norm = tl.where(counted, their_norm, 1.0)[:, None]
    # Rows that do not count are not read; 0 in their place makes a gradient of 0.
    inside = counted[:, None] & (cols[None, :] < d)
    ours = _place(row, batch, tokens, a_layer, a_batch, a_token)[:, None] + cols[None, :] * a_col
    theirs = _place(row, batch, tokens, b_layer, b_batch, b_token)[:, None] + cols[None, :] * b_col
    x = tl.load(a + ours, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(b + theirs, mask=inside, other=0.0).to(tl.float32)
    found = g * (y / their_norm - c * (x / our_norm)) / our_norm
    held = there[:, None] & (cols[None, :] < d)
    tl.store(out + row[:, None] * d + cols[None, :], found.to(out.dtype.element_ty), mask=held)


def cosines(hidden: Tensor, original: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine and both norms of every token, float32; 0 where it is not counted or a norm is 0."""
    _layers, batch, tokens, d = hidden.shape
    cosine, norm, original_norm = (
        torch.empty(hidden.shape[:3], dtype=torch.float32, device=hidden.device) for _ in range(3)
    )
    counted = mask.to(torch.int8).contiguous()
    rows = cosine.numel()
    strides = (*hidden.stride(), *original.stride())
    if rows:
        with torch.cuda.device_of(hidden):
            _cosines[(triton.cdiv(rows, _BR),)](
                hidden,
                original,
                counted,
                cosine,
                norm,
                original_norm,
                rows,
                batch,
                tokens,
                d,
                *strides,
                _BR,
                _BD,
            )
    return cosine, norm, original_norm


def gradient(
    hidden: Tensor, original: Tensor, cosine: Tensor, norm: Tensor, original_norm: Tensor, upstream: Tensor
) -> Tensor:
    """The gradient with respect to `hidden`, in its dtype."""
    _layers, batch, tokens, d = hidden.shape
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    known = (cosine, norm, original_norm, upstream.contiguous())
    strides = (*hidden.stride(), *original.stride())
    rows = cosine.numel()
    if out.numel():
        with torch.cuda.device_of(hidden):
            _gradient[triton.cdiv(rows, _BR), triton.cdiv(d, _BD)](
                hidden, original, *known, out, rows, batch, tokens, d, *strides, _BR, _BD
            )
    return out
