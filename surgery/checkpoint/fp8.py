"""Weights in block-scaled fp8: 8-bit floats (e4m3) with one scale for every block of rows and columns.

The weight is `codes * scale`, the scale being that of the code's block. `X.weight` holds the codes,
`X.weight_scale_inv` the scales (an inverse only from the point of view of the quantiser). The format is that of
DeepSeek-V3 (arXiv 2412.19437, section 3.3) and of transformers' `FineGrainedFP8Config`.

Of a code's 8 bits one is the sign, 4 are the exponent (bias 7) and 3 the fraction; 0x7f and 0xff are no number, and
there is no infinity (Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.checkpoint.quantised import Scaling
from surgery.errors import InputError

LARGEST = 448.0
"""The largest value of a code."""

OVERFLOW = 464.0
"""Half a step above the largest value: what is smaller rounds to it, as any other value rounds to its neighbour."""

# Seven bits further left a code is the float16 of the same sign and fraction, its exponent less by 15 - 7.
_SHIFT, _KEPT, _UNBIAS = 7, -16512, 256.0


@dataclass(frozen=True)
class Scaled:
    """A weight in block-scaled fp8.

    Attributes:
        codes: (m, n) or (experts, m, n), float8_e4m3fn.
        scales: The same with one entry for a block, any floating dtype.
        scaling: Size of the blocks and kind of the scales.
    """

    codes: Tensor
    scales: Tensor
    scaling: Scaling

    def dequantised(self) -> Tensor:
        """The weight in float32."""
        weight = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        flat = weight.view(-1, *weight.shape[-2:])
        for number, matrix in enumerate(self.matrices()):
            for band, rows in bands(matrix.codes.shape[0], self.scaling.block[0]):
                torch.mul(decode(matrix.codes[rows]), matrix.columns(band), out=flat[number, rows])
        return weight

    def matrices(self) -> list["Scaled"]:
        """Each matrix of a stack; this one alone where there is no stack."""
        codes, scales = (part.reshape(-1, *part.shape[-2:]) for part in (self.codes, self.scales))
        return [Scaled(*parts, self.scaling) for parts in zip(codes, scales, strict=True)]

    def columns(self, band: int) -> Tensor:
        """The scale of every column in one band of blocks, float32."""
        return spread(self.scales[band], self.scaling.block[1], self.codes.shape[-1])


def bands(rows: int, height: int) -> Iterator[tuple[int, slice]]:
    """Rows of blocks: the number of each, and which rows of the matrix it holds."""
    for band, first in enumerate(range(0, rows, height)):
        yield band, slice(first, min(first + height, rows))


def spread(scales: Tensor, width: int, columns: int) -> Tensor:
    """One scale for every column from one for every block, float32."""
    return scales.float().repeat_interleave(width)[:columns]


def decode(codes: Tensor) -> Tensor:
    """The values of codes in float32; 480 and -480 for the two that are no number."""
    bits = codes.view(torch.int8).to(torch.int16)
    return bits.bitwise_left_shift_(_SHIFT).bitwise_and_(_KEPT).view(torch.float16).float().mul_(_UNBIAS)


def encode(values: Tensor) -> Tensor:
    """The codes nearest to finite values, ties to even; beyond the largest, the largest."""
    # Older releases of torch turn what is too large into no number.
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def is_finite(codes: Tensor) -> bool:
    """Whether every code is a number."""
    if not codes.numel():
        return True
    # As numbers of 8 bits the two that are none are the largest, with a sign and without.
    return int(codes.view(torch.int8).amax()) != 0x7F and int(codes.view(torch.uint8).amax()) != 0xFF


def block_maxima(values: Tensor, width: int) -> Tensor:
    """The largest magnitude in each block of one band of rows."""
    columns = values.abs().amax(0)
    blocks = -(-columns.numel() // width)
    padded = columns.new_zeros(blocks * width)
    padded[: columns.numel()] = columns
    return padded.view(blocks, width).amax(1)


def fresh_scales(largest: Tensor, dtype: torch.dtype, scaling: Scaling) -> Tensor:
    """The scales at which blocks with these largest magnitudes use all of the range; 1 for a block of zeros.

    Raises:
        InputError: One does not fit `dtype`.
    """
    scales = largest / LARGEST
    if scaling.powers_of_two:
        fraction, exponent = torch.frexp(scales)
        scales = torch.ldexp(torch.ones_like(scales), exponent - (fraction == 0.5).int())
    # A scale of zero would lose the block, so the smallest one stands in for what is smaller.
    scales = torch.where(largest > 0, scales.clamp(min=torch.finfo(dtype).tiny), 1.0).to(dtype)
    if not bool(torch.isfinite(scales).all()):
        raise InputError(
            f"{scaling.name}: a scale does not fit {str(dtype).removeprefix('torch.')}; lower --alpha"
        )
    return scales


def quantise(weight: Tensor, dtype: torch.dtype, scaling: Scaling) -> Scaled:
    """A finite weight in fp8 with fresh scales, rounded to nearest.

    Args:
        weight: (m, n) or (experts, m, n), any floating dtype.
        dtype: Of the scales.
        scaling: Size of the blocks and kind of the scales.
    """
    flat = weight.reshape(-1, *weight.shape[-2:])
    height, width = scaling.block
    rows, columns = -(-flat.shape[1] // height), -(-flat.shape[2] // width)
    codes = torch.empty(flat.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty((flat.shape[0], rows, columns), dtype=dtype, device=weight.device)
    for matrix, its_codes, its_scales in zip(flat, codes, scales, strict=True):
        for band, at in bands(flat.shape[1], height):
            values = matrix[at].float()
            its_scales[band] = fresh_scales(block_maxima(values, width), dtype, scaling)
            its_codes[at] = encode(values / spread(its_scales[band], width, flat.shape[2]))
    return Scaled(codes.view(weight.shape), scales.view(*weight.shape[:-2], rows, columns), scaling)
