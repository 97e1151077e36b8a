"""Triton twin of `difference`: the difference exists in registers only.

Every kernel works on blocks of rows [BM] and columns [BN] of one pair of the stack; `B` columns of the factor go with
them. `no_type_check` keeps run-time checks of annotations, which would wrap the source that Triton reads, away.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from einops import reduce
from torch import Tensor

# Compiled for compute capability 8.0 these keep all in registers (64 rows spill) and need 32 KB of shared memory.
_BM, _BN, _STAGES = 32, 64, 2
# Columns of the factor that one program holds; more are dealt to further programs, which read the weights again.
_MOST = 32
# Partial sums of a Gram product: each is as large as the result.
_GROUPS = 32


@triton.jit
@no_type_check
def _delta(a, b, rows, cols, a_row, a_col, b_row, b_col, inside):
    """The tile [BM, BN] of the difference in float32, 0 outside of the matrix."""
    ours = tl.load(a + rows[:, None] * a_row + cols[None, :] * a_col, mask=inside, other=0.0)
    theirs = tl.load(b + rows[:, None] * b_row + cols[None, :] * b_col, mask=inside, other=0.0)
    return ours.to(tl.float32) - theirs.to(tl.float32)


@triton.jit
@no_type_check
def _right(
    a, b, x, y, m, n, width, a_batch, a_row, a_col, b_batch, b_row, b_col,
    BM: tl.constexpr, BN: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One block of rows of D X; x is (batch, n, width) and y (batch, m, width), both contiguous."""
    # Indices are int64 throughout: a stack may hold more than 2^31 entries.
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    vectors = tl.program_id(2).to(tl.int64) * B + tl.arange(0, B)
    total = tl.zeros((BM, B), tl.float32)
    for start in range(0, n, BN):
        cols = start + tl.arange(0, BN).to(tl.int64)
        inside = (rows[:, None] < m) & (cols[None, :] < n)
        delta = _delta(a + pair * a_batch, b + pair * b_batch, rows, cols, a_row, a_col, b_row, b_col, inside)
        factor = tl.load(  # [BN, B]
            x + (pair * n + cols[:, None]) * width + vectors[None, :],
            mask=(cols[:, None] < n) & (vectors[None, :] < width),
            other=0.0,
        )
        # ieee, not tf32: ten bits would decide which directions are found.
        total = tl.dot(delta, factor, total, input_precision="ieee")
    held = (rows[:, None] < m) & (vectors[None, :] < width)
    tl.store(y + (pair * m + rows[:, None]) * width + vectors[None, :], total, mask=held)


@triton.jit
@no_type_check
def _left(
    a, b, y, z, m, n, width, a_batch, a_row, a_col, b_batch, b_row, b_col,
    BM: tl.constexpr, BN: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One block of columns of D, transposed, times Y; y is (batch, m, width) and z (batch, n, width)."""
    pair = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    vectors = tl.program_id(2).to(tl.int64) * B + tl.arange(0, B)
    total = tl.zeros((BN, B), tl.float32)
    for start in range(0, m, BM):
        rows = start + tl.arange(0, BM).to(tl.int64)
        inside = (rows[:, None] < m) & (cols[None, :] < n)
        delta = _delta(a + pair * a_batch, b + pair * b_batch, rows, cols, a_row, a_col, b_row, b_col, inside)
        factor = tl.load(  # [BM, B]
            y + (pair * m + rows[:, None]) * width + vectors[None, :],
            mask=(rows[:, None] < m) & (vectors[None, :] < width),
            other=0.0,
        )
        total = tl.dot(tl.trans(delta), factor, total, input_precision="ieee")
    held = (cols[:, None] < n) & (vectors[None, :] < width)
    tl.store(z + (pair * n + cols[:, None]) * width + vectors[None, :], total, mask=held)


@triton.jit
@no_type_check
def _gram(
    a, b, x, y, z, m, n, width, groups, a_batch, a_row, a_col, b_batch, b_row, b_col,
    BM: tl.constexpr, BN: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Every `groups`-th block of rows: its part of Y = D X, and what D^T Y gains by it, added up in z.

    z is (batch, groups, n, width): one sum a program, so that the order of additions depends on the shape alone.
    The second look at a block of rows finds it in the cache.
    """
    group, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    vectors = tl.program_id(2).to(tl.int64) * B + tl.arange(0, B)
    for first in range(group * BM, m, groups * BM):
        rows = first + tl.arange(0, BM).to(tl.int64)
        image = tl.zeros((BM, B), tl.float32)
        for start in range(0, n, BN):
            cols = start + tl.arange(0, BN).to(tl.int64)
            inside = (rows[:, None] < m) & (cols[None, :] < n)
            delta = _delta(
                a + pair * a_batch, b + pair * b_batch, rows, cols, a_row, a_col, b_row, b_col, inside
            )
            factor = tl.load(  # [BN, B]
                x + (pair * n + cols[:, None]) * width + vectors[None, :],
                mask=(cols[:, None] < n) & (vectors[None, :] < width),
                other=0.0,
            )
            image = tl.dot(delta, factor, image, input_precision="ieee")
        held = (rows[:, None] < m) & (vectors[None, :] < width)
        tl.store(y + (pair * m + rows[:, None]) * width + vectors[None, :], image, mask=held)
        for start in range(0, n, BN):
            cols = start + tl.arange(0, BN).to(tl.int64)
            inside = (rows[:, None] < m) & (cols[None, :] < n)
            delta = _delta(
                a + pair * a_batch, b + pair * b_batch, rows, cols, a_row, a_col, b_row, b_col, inside
            )
            at = z + ((pair * groups + group) * n + cols[:, None]) * width + vectors[None, :]
            gained = (cols[:, None] < n) & (vectors[None, :] < width)
            # The first block of rows finds nothing to add to.
            total = tl.load(at, mask=gained & (first > group * BM), other=0.0)
            tl.store(at, tl.dot(tl.trans(delta), image, total, input_precision="ieee"), mask=gained)
        # What one thread has stored another may load in the next round.
        tl.debug_barrier()


@triton.jit
@no_type_check
def _energy(
    a, b, out, m, n, a_batch, a_row, a_col, b_batch, b_row, b_col, BM: tl.constexpr, BN: tl.constexpr
):
    """The sum of squares of one block of rows; out is (batch, blocks) in float64."""
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    total = tl.zeros((BM,), tl.float64)
    for start in range(0, n, BN):
        cols = start + tl.arange(0, BN).to(tl.int64)
        inside = (rows[:, None] < m) & (cols[None, :] < n)
        delta = _delta(a + pair * a_batch, b + pair * b_batch, rows, cols, a_row, a_col, b_row, b_col, inside)
        double = delta.to(tl.float64)
        total += tl.sum(double * double, axis=1)
    tl.store(out + pair * tl.num_programs(0) + tl.program_id(0), tl.sum(total, axis=0))


def right_product(aligned: Tensor, base: Tensor, columns: Tensor) -> Tensor:
    """`(aligned - base) @ columns`, float32."""
    (batch, m, n), width = aligned.shape, columns.shape[2]
    out = columns.new_empty(batch, m, width)
    block = _block(width)
    grid = (triton.cdiv(m, _BM), batch, triton.cdiv(width, block))
    strides = (*aligned.stride(), *base.stride())
    if out.numel():
        with torch.cuda.device_of(aligned):
            _right[grid](
                aligned,
                base,
                columns.contiguous(),
                out,
                m,
                n,
                width,
                *strides,
                _BM,
                _BN,
                block,
                num_stages=_STAGES,
            )
    return out


def left_product(aligned: Tensor, base: Tensor, columns: Tensor) -> Tensor:
    """`(aligned - base)^T @ columns`, float32."""
    (batch, m, n), width = aligned.shape, columns.shape[2]
    out = columns.new_empty(batch, n, width)
    block = _block(width)
    grid = (triton.cdiv(n, _BN), batch, triton.cdiv(width, block))
    strides = (*aligned.stride(), *base.stride())
    if out.numel():
        with torch.cuda.device_of(aligned):
            _left[grid](
                aligned,
                base,
                columns.contiguous(),
                out,
                m,
                n,
                width,
                *strides,
                _BM,
                _BN,
                block,
                num_stages=_STAGES,
            )
    return out


def gram_product(aligned: Tensor, base: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """`Y = (aligned - base) @ columns` and `(aligned - base)^T @ Y`, float32."""
    (batch, m, n), width = aligned.shape, columns.shape[2]
    groups, block = min(_GROUPS, triton.cdiv(m, _BM)), _block(width)
    image, parts = columns.new_empty(batch, m, width), columns.new_empty(batch, groups, n, width)
    grid = (groups, batch, triton.cdiv(width, block))
    strides = (*aligned.stride(), *base.stride())
    if image.numel() or parts.numel():
        with torch.cuda.device_of(aligned):
            columns = columns.contiguous()
            _gram[grid](
                aligned,
                base,
                columns,
                image,
                parts,
                m,
                n,
                width,
                groups,
                *strides,
                _BM,
                _BN,
                block,
                num_stages=_STAGES,
            )
    return image, reduce(parts, "batch group n b -> batch n b", "sum")


def energy(aligned: Tensor, base: Tensor) -> Tensor:
    """The sum of squares of each difference, float64."""
    batch, m, n = aligned.shape
    blocks = triton.cdiv(m, _BM)
    out = torch.empty(batch, blocks, dtype=torch.float64, device=aligned.device)
    if out.numel():
        with torch.cuda.device_of(aligned):
            _energy[blocks, batch](
                aligned, base, out, m, n, *aligned.stride(), *base.stride(), _BM, _BN, num_stages=_STAGES
            )
    return reduce(out, "batch block -> batch", "sum")


def _block(width: int) -> int:
    """Columns per program: a power of two, of which a product of blocks needs at least 16."""
    return min(_MOST, max(16, triton.next_power_of_2(width)))
