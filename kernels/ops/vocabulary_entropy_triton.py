"""Triton twin of `vocabulary_entropy`: forward the logits stay in registers, backward a chunk of them is stored.

The vocabulary is dealt to programs in stretches of a fixed length, and their sums are joined afterwards: a few tokens
keep a whole device busy, and the order of additions depends on the shapes alone.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgery.kernels.backend import interpreted

_BT, _BV, _BD = 32, 64, 64
_STRETCH = 2048


@triton.jit
@no_type_check
def _logits(
    h, w, rows, cols, tokens, end, d, h_row, h_col, w_row, w_col,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A block [BT, BV] of logits in float32."""
    total = tl.zeros((BT, BV), tl.float32)
    for start in range(0, d, BD):
        inner = start + tl.arange(0, BD).to(tl.int64)
        states = tl.load(  # [BT, BD]
            h + rows[:, None] * h_row + inner[None, :] * h_col,
            mask=(rows[:, None] < tokens) & (inner[None, :] < d),
            other=0.0,
        )
        weights = tl.load(  # [BD, BV]
            w + cols[None, :] * w_row + inner[:, None] * w_col,
            mask=(cols[None, :] < end) & (inner[:, None] < d),
            other=0.0,
        )
        if WIDEN:
            states, weights = states.to(tl.float32), weights.to(tl.float32)
        # Products of half-precision numbers are exact in float32; those of float32 are taken in full, not in tf32.
        total = tl.dot(states, weights, total, input_precision="ieee")
    return total


@triton.jit
@no_type_check
def _sums(
    h, w, largest, total, moment, tokens, vocabulary, d, h_row, h_col, w_row, w_col,
    STRETCH: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """c, s and u of a block of tokens over one stretch of the vocabulary; outputs are (tokens, stretches)."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    begin = tl.program_id(1).to(tl.int64) * STRETCH
    end = tl.minimum(begin + STRETCH, vocabulary)
    # The most negative float32 and not -inf: differences from it are no NaN.
    c = tl.full((BT,), -3.4028234663852886e38, tl.float32)
    s = tl.zeros((BT,), tl.float32)
    u = tl.zeros((BT,), tl.float32)
    for start in range(begin, end, BV):
        cols = start + tl.arange(0, BV).to(tl.int64)
        logits = _logits(h, w, rows, cols, tokens, end, d, h_row, h_col, w_row, w_col, BT, BV, BD, WIDEN)
        inside = cols[None, :] < end
        new = tl.maximum(c, tl.max(tl.where(inside, logits, -3.4028234663852886e38), axis=1))
        shifted = tl.where(inside, logits - new[:, None], 0.0)
        shares = tl.where(inside, tl.exp(shifted), 0.0)
        moved = c - new
        scale = tl.exp(moved)
        u = scale * (u + moved * s) + tl.sum(shares * shifted, axis=1)
        s = scale * s + tl.sum(shares, axis=1)
        c = new
    at = rows * tl.num_programs(1) + tl.program_id(1)
    tl.store(largest + at, c, mask=rows < tokens)
    tl.store(total + at, s, mask=rows < tokens)
    tl.store(moment + at, u, mask=rows < tokens)


@triton.jit
@no_type_check
def _gradient(
    h, w, largest, total, moment, upstream, out, tokens, vocabulary, d, h_row, h_col, w_row, w_col,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A block [BT, BV] of the gradient with respect to the logits; out is (tokens, vocabulary)."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    cols = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    logits = _logits(h, w, rows, cols, tokens, vocabulary, d, h_row, h_col, w_row, w_col, BT, BV, BD, WIDEN)
    there = rows < tokens
    c = tl.load(largest + rows, mask=there, other=0.0)
    s = tl.load(total + rows, mask=there, other=1.0)
    u = tl.load(moment + rows, mask=there, other=0.0)
    g = tl.load(upstream + rows, mask=there, other=0.0)
    shifted = logits - c[:, None]
    shares = tl.exp(shifted - tl.log(s)[:, None])
    found = -g[:, None] * shares * (shifted - (u / s)[:, None])
    held = there[:, None] & (cols[None, :] < vocabulary)
    tl.store(out + rows[:, None] * vocabulary + cols[None, :], found, mask=held)


def sums(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c, s and u of every token over every stretch of the vocabulary: (tokens, stretches), float32."""
    (tokens, d), vocabulary = hidden.shape, len(weight)
    stretches = triton.cdiv(vocabulary, _STRETCH)
    largest, total, moment = (
        torch.empty(tokens, stretches, dtype=torch.float32, device=hidden.device) for _ in range(3)
    )
    strides, widen = (*hidden.stride(), *weight.stride()), _widen(hidden)
    if tokens:
        with torch.cuda.device_of(hidden):
            _sums[triton.cdiv(tokens, _BT), stretches](
                hidden,
                weight,
                largest,
                total,
                moment,
                tokens,
                vocabulary,
                d,
                *strides,
                _STRETCH,
                _BT,
                _BV,
                _BD,
                widen,
            )
    return largest, total, moment


def logit_gradient(
    hidden: Tensor, weight: Tensor, largest: Tensor, total: Tensor, moment: Tensor, upstream: Tensor
) -> Tensor:
    """What a unit of each logit adds to the loss: (tokens, vocabulary), float32."""
    (tokens, d), vocabulary = hidden.shape, len(weight)
    out = torch.empty(tokens, vocabulary, dtype=torch.float32, device=hidden.device)
    strides, widen = (*hidden.stride(), *weight.stride()), _widen(hidden)
    known = (part.contiguous() for part in (largest, total, moment, upstream))
    if tokens:
        with torch.cuda.device_of(hidden):
            _gradient[triton.cdiv(tokens, _BT), triton.cdiv(vocabulary, _BV)](
                hidden, weight, *known, out, tokens, vocabulary, d, *strides, _BT, _BV, _BD, widen
            )
    return out


def _widen(hidden: Tensor) -> bool:
    """Whether to multiply in float32: Triton's interpreter (3.7) would multiply the bits of bfloat16 as integers."""
    return hidden.dtype == torch.bfloat16 and interpreted()
