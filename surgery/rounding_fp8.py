"""Storing an edit in block-scaled fp8; the modes are those of `surgery.rounding`.

An fp8 weight lies on a grid of its own: 8-bit values (3 bits of fraction) times the scale of its block. Every block
gets a fresh scale, at which its largest entry is the largest value, with two exceptions for an anchor that is in fp8:

* a block in which the edit changes nothing keeps codes and scale;
* a block that did not use the whole range keeps its scale while the edited block fits: its scales were chosen by
  another rule (powers of two, another largest value), and a fresh one would move every entry to another grid, which
  adds the error of a whole quantisation, some thirty times an edit of a thousandth of the weight. Where the rule is
  the same, the scale moves by less than the edit does, and entries stay where they are on the grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from surgery.checkpoint.fp8 import (
    LARGEST,
    OVERFLOW,
    Scaled,
    bands,
    block_maxima,
    decode,
    encode,
    fresh_scales,
)
from surgery.checkpoint.quantised import Scaling
from surgery.kernels import philox
from surgery.rounding import ENOUGH, LIMIT, PATIENCE, TOLERANCE, Mode
from surgery.spectral import Factors

Rounder = Callable[[Tensor, int], Tensor]
"""(values on the grid of codes, flat index of the first) -> codes."""

# Exponents of the smallest normal code and of the step below it; a step is this much smaller than its power of two.
_SMALLEST, _FRACTION = -6, 3
_PASSES, _WIDTH = 3, 8


@dataclass(frozen=True)
class StoredFp8:
    """An edited weight in block-scaled fp8; the figures are those of `surgery.rounding.Stored`.

    Attributes:
        weight: Codes and scales.
        cores: What was rounded, anchor + left @ core @ right; one for each matrix of a stack.
        fresh: Blocks that did not keep their scale.
    """

    weight: Scaled
    cores: tuple[Float64[Tensor, "k k"], ...]
    mode: str
    iterations: int
    inner: float
    edit_energy: float
    noise_energy: float
    noise_spectral: float
    anchor_energy: float
    changed: int
    fresh: int


class _LowRank:
    """`left @ diag(values) @ right` with orthonormal outer factors, as a core between them."""

    def __init__(self, factors: Factors) -> None:
        self._left, self._right = factors.left.double(), factors.right.float()
        right = factors.right.double()
        self.core: Tensor = torch.diag(factors.values.double())
        self.target: Tensor = self._left.mT @ self._left @ self.core @ (right @ right.mT)

    def scaled(self, core: Tensor) -> Tensor:
        """`left @ core`, made once for all rows."""
        return (self._left @ core).float()

    def rows(self, scaled: Tensor, rows: slice) -> Tensor:
        """Rows of the edit."""
        return scaled[rows] @ self._right

    def project(self, stored: Tensor, rows: slice) -> Tensor:
        """The share of some rows in the core of a stored edit."""
        return self._left[rows].mT @ (stored @ self._right.mT).double()

    def spectral(self, seed: int) -> float:
        """The spectral norm."""
        del seed
        return float(torch.linalg.matrix_norm(self.target, 2))


class _Dense:
    """An edit of full rank; its core is its length."""

    def __init__(self, edit: Tensor) -> None:
        self._edit = edit
        self.core = self.target = torch.linalg.vector_norm(edit, dtype=torch.float64).view(1, 1)

    def scaled(self, core: Tensor) -> Tensor:
        """The gain: 1 for the edit as intended."""
        return core / self.core

    def rows(self, scaled: Tensor, rows: slice) -> Tensor:
        """Rows of the edit."""
        return (self._edit[rows] * scaled).float()

    def project(self, stored: Tensor, rows: slice) -> Tensor:
        """`<stored, edit> / ||edit||`."""
        return (stored * self._edit[rows]).sum(dtype=torch.float64).view(1, 1) / self.core

    def spectral(self, seed: int) -> float:
        """The spectral norm, estimated."""
        return _stretch(self._edit.float(), seed)


class _Matrix:
    """One matrix, its edit, and where both codes and scales are stored."""

    def __init__(
        self, anchor: Tensor | Scaled, edit: Factors | Tensor, out: Scaled, rounder: Rounder, first: int
    ) -> None:
        self._anchor, self._out, self._rounder, self._first = anchor, out, rounder, first
        self.edit = _Dense(edit) if isinstance(edit, Tensor) else _LowRank(edit)
        self.energy = float((self.edit.core * self.edit.target).sum())
        self.found = torch.zeros_like(self.edit.core)
        self.core, self.iterations, self.fresh = self.edit.core, 0, 0

    def _bands(self) -> list[tuple[int, slice]]:
        return list(bands(self._out.codes.shape[0], self._out.scaling.block[0]))

    def _weight(self, band: int, rows: slice) -> Tensor:
        """Rows of the anchor in float32."""
        if isinstance(self._anchor, Tensor):
            return self._anchor[rows].float()
        return decode(self._anchor.codes[rows]).mul_(self._anchor.columns(band))

    def write(self, core: Tensor, *, choose: bool = False) -> None:
        """Round anchor + edit(`core`) into the output; with `choose` the scales are chosen for it first."""
        scaled, self.core = self.edit.scaled(core), core
        self.found = torch.zeros_like(core)
        width = self._out.codes.shape[1]
        for band, rows in self._bands():
            weight = self._weight(band, rows)
            target = weight + self.edit.rows(scaled, rows)
            if choose:
                self._choose(band, weight, target)
            columns = self._out.columns(band)
            codes = self._rounder(target.div_(columns), self._first + rows.start * width)
            self._out.codes[rows] = codes
            self.found += self.edit.project(decode(codes).mul_(columns).sub_(weight), rows)

    def _choose(self, band: int, weight: Tensor, target: Tensor) -> None:
        """The scales of one band of blocks; the module's description gives the rule."""
        width, dtype = self._out.scaling.block[1], self._out.scales.dtype
        largest = block_maxima(target, width)
        chosen = fresh_scales(largest, dtype, self._out.scaling)
        keep = torch.zeros_like(chosen, dtype=torch.bool)
        if isinstance(self._anchor, Scaled):
            own = self._anchor.scales[band].float()
            before = block_maxima(weight, width)
            fits = (largest < OVERFLOW * own) & (2 * largest >= before)
            # An entry of the largest value is that times the scale, but for the roundoff of float32.
            whole = before > (LARGEST - 1) * own
            keep = fits & ~whole if not self._out.scaling.powers_of_two else keep
            if bool((largest == before).any()):
                keep |= block_maxima(target - weight, width) == 0
            chosen = torch.where(keep, own.to(dtype), chosen)
        self._out.scales[band] = chosen
        self.fresh += int((~keep).sum())

    def compensate(self) -> None:
        """Correct the core until what is stored has the intended one; see `surgery.rounding`."""
        best, least, setbacks, length = (self.core, self.found), float("inf"), 0, 1.0
        for self.iterations in range(LIMIT + 1):
            residual = self.edit.target - self.found
            error = float(torch.linalg.matrix_norm(residual)) / self.energy**0.5
            if error < least:
                best, least = (self.core, self.found), error
            else:
                setbacks += 1
            if error <= TOLERANCE or setbacks >= PATIENCE or self.iterations == LIMIT:
                break
            step, before = residual * (length * 0.5**setbacks), self.found
            self.write(self.core + step)
            # Small edits answer weakly at first: the next step is as long as this one's answer calls for.
            answer = float((step * (self.found - before)).sum() / (step * step).sum())
            length = min(max(1 / answer if answer > 0 else 2 * length, 0.5), 2 * length)
        if self.core is not best[0]:
            self.write(best[0])

    def restore_zeros(self) -> None:
        """Give zeros the sign they have in the anchor, where adding an edit of zero lost it."""
        if isinstance(self._anchor, Scaled):
            old, new = self._anchor.codes.view(torch.uint8), self._out.codes.view(torch.uint8)
            for _, rows in self._bands():
                lost = (old[rows] == 0x80) & (new[rows] == 0)
                new[rows] |= lost.view(torch.uint8) << 7

    def judge(self, seed: int) -> tuple[float, float, float, int]:
        """Energy of the noise, its spectral norm over the edit's, energy of the anchor, and entries that changed."""
        noise, changed, anchor = torch.empty(self._out.codes.shape, device=self._out.codes.device), 0, 0.0
        scaled = self.edit.scaled(self.edit.core)
        for band, rows in self._bands():
            weight, columns = self._weight(band, rows), self._out.columns(band)
            stored = self._out.codes[rows]
            anchor += _energy(weight)
            off = decode(stored).mul_(columns).sub_(weight)
            torch.sub(off, self.edit.rows(scaled, rows), out=noise[rows])
            changed += _differing(stored, encode(weight.div_(columns)))
        edit = self.edit.spectral(seed)
        return _energy(noise), _stretch(noise, seed) / edit if edit else 0.0, anchor, changed


def _differing(one: Tensor, other: Tensor) -> int:
    """How many codes stand for different values."""
    one, other = one.view(torch.uint8), other.view(torch.uint8)
    # -0.0 and 0.0 are two codes and one value.
    return int(torch.count_nonzero((one != other) & ((one | other) != 0x80)))


def store_fp8(
    anchor: Tensor | Scaled,
    edit: Factors | Float[Tensor, "*batch m n"],
    scaling: Scaling,
    scales: torch.dtype,
    *,
    mode: Mode,
    seed: int,
    name: str,
) -> StoredFp8:
    """`anchor + edit` in block-scaled fp8, with one rounding at the end, and how much of the edit that kept.

    The sum is taken in float32. Memory: the codes, and one matrix of a stack in float32. An edit of zero gives an
    fp8 anchor with the same blocks byte for byte.

    Args:
        anchor: One matrix or a stack of them, finite, of any floating dtype or in fp8.
        edit: The intended edit, scale included: orthonormal factors or, of full rank, a tensor.
        scaling: How the result is stored.
        scales: Dtype of its scales.
        mode: How to round.
        seed: With `name`, the key of the random bits (`stochastic`) and of the norm estimate.
        name: The tensor's name, for that key and for errors.

    Raises:
        InputError: The sum is too large for float32, or a scale for its dtype.
    """
    if isinstance(anchor, Scaled) and anchor.scaling.block != scaling.block:
        anchor = anchor.dequantised()
    words = philox.key(seed, name)
    rounder = _stochastic(words) if mode == "stochastic" else _nearest
    out = _empty(anchor, scaling, scales)
    matrices = _matrices(anchor, edit, out, rounder)
    for matrix in matrices:
        matrix.write(matrix.edit.core, choose=True)
    return _judged(matrices, out, _finish(matrices, mode), words[0] | words[1] << 31)


def replay(
    anchor: Tensor | Scaled,
    edit: Factors | Tensor,
    scaling: Scaling,
    scales: Tensor,
    cores: tuple[Tensor, ...],
    *,
    mode: str,
    seed: int,
    name: str,
) -> Scaled:
    """The weight that `store_fp8` gave, from the scales and cores that it chose: one pass and nothing measured."""
    if isinstance(anchor, Scaled) and anchor.scaling.block != scaling.block:
        anchor = anchor.dequantised()
    rounder = _stochastic(philox.key(seed, name)) if mode == "stochastic" else _nearest
    out = _empty(anchor, scaling, scales.dtype)
    out.scales.copy_(scales)
    for matrix, core in zip(_matrices(anchor, edit, out, rounder), cores, strict=True):
        matrix.write(core)
        matrix.restore_zeros()
    return out


def _empty(anchor: Tensor | Scaled, scaling: Scaling, dtype: torch.dtype) -> Scaled:
    values = anchor if isinstance(anchor, Tensor) else anchor.codes
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    grid = scaling.grid(tuple(values.shape))
    return Scaled(codes, torch.empty(grid, dtype=dtype, device=values.device), scaling)


def _matrices(
    anchor: Tensor | Scaled, edit: Factors | Tensor, out: Scaled, rounder: Rounder
) -> list[_Matrix]:
    """The matrices of a stack, their edits and their places."""
    shape = out.codes.shape[-2:]
    if isinstance(edit, Tensor):
        edits: list[Factors | Tensor] = list(edit.reshape(-1, *shape))
    else:
        k = edit.rank
        left, right = edit.left.reshape(-1, shape[0], k), edit.right.reshape(-1, k, shape[1])
        edits = [Factors(*one) for one in zip(left, edit.values.reshape(-1, k), right, strict=True)]
    anchors = list(anchor.reshape(-1, *shape)) if isinstance(anchor, Tensor) else anchor.matrices()
    every = zip(anchors, edits, out.matrices(), strict=True)
    return [_Matrix(*one, rounder, number * shape.numel()) for number, one in enumerate(every)]


def _finish(matrices: list[_Matrix], mode: Mode) -> str:
    """Compensate where that is asked for or needed; the mode that was used."""
    energy = sum(matrix.energy for matrix in matrices)
    kept = sum(float((matrix.edit.core * matrix.found).sum()) for matrix in matrices)
    compensate = mode == "compensated" or (mode == "auto" and kept < ENOUGH * energy)
    for matrix in matrices:
        if compensate and matrix.energy > 0:
            matrix.compensate()
        matrix.restore_zeros()
    return mode if mode == "stochastic" else "compensated" if compensate and energy > 0 else "nearest"


def _judged(matrices: list[_Matrix], out: Scaled, used: str, seed: int) -> StoredFp8:
    judged = [matrix.judge(seed) for matrix in matrices]
    noise, spectral, anchor, changed = zip(*judged, strict=True)
    return StoredFp8(
        weight=out,
        cores=tuple(matrix.core for matrix in matrices),
        mode=used,
        iterations=max(matrix.iterations for matrix in matrices),
        inner=sum(float((matrix.edit.core * matrix.found).sum()) for matrix in matrices),
        edit_energy=sum(matrix.energy for matrix in matrices),
        noise_energy=sum(noise),
        noise_spectral=max(spectral),
        anchor_energy=sum(anchor),
        changed=sum(changed),
        fresh=sum(matrix.fresh for matrix in matrices),
    )


def _nearest(values: Tensor, first: int) -> Tensor:
    del first
    return encode(values)


def _stochastic(words: tuple[int, int]) -> Rounder:
    """Up with probability equal to the fraction passed, with the bits of (`words`, flat index)."""

    def rounder(values: Tensor, first: int) -> Tensor:
        values = values.double().clamp_(-LARGEST, LARGEST)
        exponent = (torch.frexp(values).exponent - 1).clamp_(min=_SMALLEST) - _FRACTION
        quantum = torch.ldexp(torch.ones_like(values), exponent)
        steps = values / quantum
        below = steps.floor()
        up = philox.uniform(first, values.numel(), words).to(values.device).view_as(values) < steps - below
        return encode(torch.where(up, below + 1, below) * quantum)

    return rounder


def _energy(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dim=-1).double().square().sum())


def _stretch(matrix: Tensor, seed: int) -> float:
    """The spectral norm of a float32 matrix, from a seeded Krylov space of 3 blocks of 8: never too large."""
    width = min(_WIDTH, matrix.shape[1])
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    basis = block[:, :0]
    for _ in range(_PASSES):
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
        basis = torch.cat((basis, block), 1)
        block = matrix.mT @ (matrix @ block)
    return float(torch.linalg.matrix_norm((matrix @ basis).double(), 2))
