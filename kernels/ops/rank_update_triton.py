"""Triton twin of `store`: the rounded sum and its figures from one reading of the weight.

Every kernel works on blocks of rows [BM] and columns [BN] of one matrix of the stack, in float32 but for the sums of
squares. `no_type_check` keeps run-time checks of annotations, which would wrap the source that Triton reads, away.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

_BM, _BN = 64, 64
# Columns of the probe that one program holds; `tl.dot` wants 16 at least.
_LEAST, _MOST = 16, 64


class Sums(NamedTuple):
    """The results of a pass; `products` holds `values @ probe`, the others a sum of squares or a count each row."""

    products: Tensor
    noise: Tensor
    anchor: Tensor
    changed: Tensor


@triton.jit
@no_type_check
def _edit(left, right, pair, rows, cols, m, n, k, BM: tl.constexpr, BN: tl.constexpr):
    """A tile [BM, BN] of left @ right; left is (batch, m, k) and right (batch, k, n), both contiguous."""
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, 16):
        terms = start + tl.arange(0, 16).to(tl.int64)
        one = tl.load(  # [BM, 16]
            left + (pair * m + rows[:, None]) * k + terms[None, :],
            mask=(rows[:, None] < m) & (terms[None, :] < k),
            other=0.0,
        )
        other = tl.load(  # [16, BN]
            right + (pair * k + terms[:, None]) * n + cols[None, :],
            mask=(terms[:, None] < k) & (cols[None, :] < n),
            other=0.0,
        )
        # ieee, not tf32: the update is added to weights whose last bit matters.
        total = tl.dot(one, other, total, input_precision="ieee")
    return total


@triton.jit
@no_type_check
def _narrow(values, kind: tl.constexpr):
    """float32 values rounded to nearest, ties to even, in the dtype `kind`."""
    # By hand, because Triton's interpreter cuts off in its cast to bfloat16, and makes subnormals zero.
    if kind == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        rounded = tl.where(values == values, bits + (0x7FFF + ((bits >> 16) & 1)), bits)
        narrow = (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = values.to(kind)
    return narrow


@triton.jit
@no_type_check
def _widened(values):
    """The same in float32."""
    if values.dtype == tl.bfloat16:
        wide = (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = values.to(tl.float32)
    return wide


@triton.jit
@no_type_check
def _stochastic(values, index, seed, SIGNIFICAND: tl.constexpr, SMALLEST: tl.constexpr):
    """`rounders.Stochastic`, bit for bit: entry i takes word i mod 4 of Philox's 64-bit counter i // 4."""
    values = values.to(tl.float64)
    exponent = ((values.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - (1022 + SIGNIFICAND)
    quantum = ((tl.maximum(exponent, SMALLEST) + 1023) << 52).to(tl.float64, bitcast=True)
    steps = values / quantum
    below = tl.floor(steps)
    counter = index // 4
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    first, second, third, fourth = tl.philox(seed, low, high, low * 0, low * 0)
    word = index % 4
    bits = tl.where(word < 2, tl.where(word == 0, first, second), tl.where(word == 2, third, fourth))
    up = bits.to(tl.float64) * 2.0**-32 < steps - below
    return (tl.where(up, below + 1, below) * quantum).to(tl.float32)


@triton.jit
@no_type_check
def _update(
    anchor, out, scaled, intended, right, probe, active, products, noises, anchors, changes,
    m, n, k, width, seed, a_batch, a_row, a_col, o_batch, o_row, o_col,
    BM: tl.constexpr, BN: tl.constexpr, B: tl.constexpr, SIGNIFICAND: tl.constexpr, SMALLEST: tl.constexpr,
    STOCHASTIC: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """One block of rows: anchor + scaled @ right, rounded; stored, and compared with anchor + intended @ right.

    probe is (batch, n, width) and products (batch, m, width), both contiguous. Without STORE nothing is stored and
    the products are those of stored minus anchor.
    """
    # Indices are int64 throughout: a stack may hold more than 2^31 entries.
    pair = tl.program_id(1).to(tl.int64)
    if tl.load(active + pair) == 0:
        return
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    # Programs for further columns of the probe repeat the rest: what two of them store is the same.
    vectors = tl.program_id(2).to(tl.int64) * B + tl.arange(0, B)
    total = tl.zeros((BM, B), tl.float32)
    noise_energy, energy = tl.zeros((BM,), tl.float64), tl.zeros((BM,), tl.float64)
    changed = tl.zeros((BM,), tl.int64)
    for start in range(0, n, BN):
        cols = start + tl.arange(0, BN).to(tl.int64)
        inside = (rows[:, None] < m) & (cols[None, :] < n)
        place = anchor + pair * a_batch + rows[:, None] * a_row + cols[None, :] * a_col
        weight = _widened(tl.load(place, mask=inside, other=0.0))
        target = weight + _edit(scaled, right, pair, rows, cols, m, n, k, BM, BN)
        if STOCHASTIC:
            index = (pair * m + rows[:, None]) * n + cols[None, :]
            target = _stochastic(target, index, seed, SIGNIFICAND, SMALLEST)
        narrow = _narrow(target, out.dtype.element_ty)
        if STORE:
            place = out + pair * o_batch + rows[:, None] * o_row + cols[None, :] * o_col
            tl.store(place, narrow, mask=inside)
        stored, own = _widened(narrow), _widened(_narrow(weight, out.dtype.element_ty))
        values = tl.where(inside, stored - weight, 0.0)
        changed += tl.sum((inside & (stored != own)).to(tl.int64), 1)
        energy += tl.sum(weight * weight, 1).to(tl.float64)
        if STORE:
            values -= _edit(intended, right, pair, rows, cols, m, n, k, BM, BN)
            noise_energy += tl.sum(values * values, 1).to(tl.float64)
        factor = tl.load(  # [BN, B]
            probe + (pair * n + cols[:, None]) * width + vectors[None, :],
            mask=(cols[:, None] < n) & (vectors[None, :] < width),
            other=0.0,
        )
        # ieee, not tf32: ten bits are fewer than the core is corrected to.
        total = tl.dot(values, factor, total, input_precision="ieee")
    held = (rows[:, None] < m) & (vectors[None, :] < width)
    tl.store(products + (pair * m + rows[:, None]) * width + vectors[None, :], total, mask=held)
    tl.store(noises + pair * m + rows, noise_energy, mask=rows < m)
    tl.store(anchors + pair * m + rows, energy, mask=rows < m)
    tl.store(changes + pair * m + rows, changed, mask=rows < m)


@triton.jit
@no_type_check
def _image(
    anchor, out, intended, right, factor, image, m, n, k, width,
    a_batch, a_row, a_col, o_batch, o_row, o_col, BM: tl.constexpr, BN: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One block of columns of factor^T @ noise; factor is (batch, m, width) and image (batch, width, n)."""
    pair = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    vectors = tl.program_id(2).to(tl.int64) * B + tl.arange(0, B)
    total = tl.zeros((B, BN), tl.float32)
    for start in range(0, m, BM):
        rows = start + tl.arange(0, BM).to(tl.int64)
        inside = (rows[:, None] < m) & (cols[None, :] < n)
        place = anchor + pair * a_batch + rows[:, None] * a_row + cols[None, :] * a_col
        weight = _widened(tl.load(place, mask=inside, other=0.0))
        place = out + pair * o_batch + rows[:, None] * o_row + cols[None, :] * o_col
        change = _widened(tl.load(place, mask=inside, other=0.0)) - weight
        noise = change - _edit(intended, right, pair, rows, cols, m, n, k, BM, BN)
        columns = tl.load(  # [BM, B]
            factor + (pair * m + rows[:, None]) * width + vectors[None, :],
            mask=(rows[:, None] < m) & (vectors[None, :] < width),
            other=0.0,
        )
        total = tl.dot(tl.trans(columns), noise, total, input_precision="ieee")
    held = (vectors[:, None] < width) & (cols[None, :] < n)
    tl.store(image + (pair * width + vectors[:, None]) * n + cols[None, :], total, mask=held)


def update(
    anchor: Tensor,
    scaled: Tensor,
    right: Tensor,
    probe: Tensor,
    active: Tensor,
    out: Tensor,
    *,
    intended: Tensor | None,
    grid: tuple[int, int],
    words: tuple[int, int] | None,
) -> Sums:
    """Round `anchor + scaled @ right` to the dtype of `out`; sums over rows of active matrices, zero for others.

    Args:
        anchor: (batch, m, n), of any layout.
        scaled: (batch, m, k) in float32.
        right: (batch, k, n) in float32.
        probe: (batch, n, width) in float32.
        active: Which matrices to look at.
        out: Where to store; of any layout.
        intended: What `scaled` would be for the intended edit, which the noise leaves out. None stores nothing, and
            the products are those of stored minus anchor.
        grid: Bits of the significand of `out`'s dtype and the exponent of its smallest number.
        words: The key of the random bits; None rounds to nearest.
    """
    (batch, m, n), k, width = anchor.shape, right.shape[1], probe.shape[-1]
    scaled, right, probe = scaled.contiguous(), right.contiguous(), probe.contiguous()
    sums = Sums(
        products=scaled.new_zeros(batch, m, width),
        noise=scaled.new_zeros(batch, m, dtype=torch.float64),
        anchor=scaled.new_zeros(batch, m, dtype=torch.float64),
        changed=scaled.new_zeros(batch, m, dtype=torch.int64),
    )
    (low, high), block = words or (0, 0), _block(width)
    _update[triton.cdiv(m, _BM), batch, triton.cdiv(width, block)](
        anchor, out, scaled, scaled if intended is None else intended.contiguous(), right, probe,
        active.to(torch.int32), *sums, m, n, k, width, low | high << 32, *anchor.stride(), *out.stride(),
        BM=_BM, BN=_BN, B=block, SIGNIFICAND=grid[0], SMALLEST=grid[1],
        STOCHASTIC=words is not None, STORE=intended is not None,
    )  # fmt: skip
    return sums


def image(anchor: Tensor, out: Tensor, intended: Tensor, right: Tensor, factor: Tensor) -> Tensor:
    """`factor^T @ (out - anchor - intended @ right)` in float32: (batch, width, n)."""
    (batch, m, n), k, width = anchor.shape, right.shape[1], factor.shape[-1]
    intended, right, factor = intended.contiguous(), right.contiguous(), factor.contiguous()
    result, block = factor.new_empty(batch, width, n), _block(width)
    _image[triton.cdiv(n, _BN), batch, triton.cdiv(width, block)](
        anchor, out, intended, right, factor, result, m, n, k, width, *anchor.stride(), *out.stride(),
        BM=_BM, BN=_BN, B=block,
    )  # fmt: skip
    return result


def _block(width: int) -> int:
    return min(_MOST, max(_LEAST, triton.next_power_of_2(width)))
