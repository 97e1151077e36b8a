"""One pass over a weight: add an edit, round once, and see what came of it, tile by tile.

A tile is a fixed number of rows, a rule of the shape alone, so neither the bytes nor the memory (the output and a few
tiles) depend on how the work is spread. Sums that cross rows are taken in float64.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from surgery.kernels import philox

TILE = 1 << 17
"""Entries of a tile: large enough to hide the cost of a call, small enough to stay in cache."""

Tile = tuple[slice, slice]
"""Which matrices, and which of their rows."""

Rounder = Callable[[Tensor, torch.dtype, int], Tensor]
"""(values, dtype, flat index of the first) -> values in `dtype`."""

# Bits of the significand with the hidden one, and the exponent of the smallest subnormal.
_GRID = {torch.bfloat16: (8, -133), torch.float16: (11, -24), torch.float32: (24, -149)}

_PASSES, _WIDTH = 3, 8


def tiles(shape: torch.Size) -> Iterator[Tile]:
    """The tiles of an (E, m, n) weight: rows of one matrix, or several whole matrices where they are small."""
    batch, m, n = shape
    rows = max(1, TILE // max(1, n))
    together = max(1, rows // max(1, m))
    for first in range(0, batch, together):
        for row in range(0, m, rows):
            yield slice(first, min(first + together, batch)), slice(row, min(row + rows, m))


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to add in: float32 for 16-bit dtypes alone, float64 with anything wider."""
    return torch.float64 if any(dtype.itemsize > 2 for dtype in dtypes) else torch.float32


def nearest(values: Float[Tensor, "*shape"], dtype: torch.dtype, start: int = 0) -> Float[Tensor, "*shape"]:
    """`values` rounded once to `dtype`, ties to even; overflow gives infinity."""
    del start
    if values.dtype == torch.float64 and dtype.itemsize == 2:
        values = _to_odd(values)
    return values.to(dtype)


def stochastic(words: tuple[int, int]) -> Rounder:
    """A rounding that goes up with probability equal to the fraction passed, with the bits of (`words`, flat index).

    Unbiased to 2**-32 of a step, subnormals included; values on the grid of `dtype` stay, as all do for float64.
    """

    def rounder(values: Tensor, dtype: torch.dtype, start: int) -> Tensor:
        if dtype == torch.float64:
            return values.to(dtype)
        significand, smallest = _GRID[dtype]
        values = values.double()
        exponent = ((values.view(torch.int64) >> 52) & 0x7FF) - (1022 + significand)
        quantum = ((exponent.clamp_(min=smallest) + 1023) << 52).view(torch.float64)
        steps = values / quantum
        below = steps.floor()
        drawn = philox.uniform(start, values.numel(), words).to(values.device)
        up = drawn.view_as(values) < steps - below
        # `where`, not a sum: -0.0 + 0.0 would lose the sign.
        return (torch.where(up, below + 1, below) * quantum).to(dtype)

    return rounder


def _to_odd(values: Float64[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """float32 with the last bit set where inexact: rounding that again gives what one rounding would.

    torch casts float64 to 16 bits by way of a *nearest* float32, which rounds twice and moves some ties.
    Boldo, Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.
    """
    near = values.float()
    bits = near.view(torch.int32)
    bits = torch.where(near.abs() > values.abs(), bits - 1, bits)
    return torch.where(near != values, bits | 1, bits).view(torch.float32)


class AbstractEdit(ABC):
    """An intended edit E of a batch of matrices, written in a k x k core per matrix, in float64.

    `core` gives E itself; `target` is what `project` sums to over all tiles if E is stored exactly.
    Then <stored, E> = sum(core * projection) and ||E||_F^2 = sum(core * target).
    """

    core: Float64[Tensor, "batch k k"]
    target: Float64[Tensor, "batch k k"]
    dtype: torch.dtype
    """The dtype sums are taken in."""

    @abstractmethod
    def scaled(self, core: Float64[Tensor, "batch k k"]) -> Float[Tensor, "batch a b"]:
        """What `add` needs of `core`, made once for all tiles so that no tile rounds it its own way."""

    @abstractmethod
    def add(
        self, weight: Float[Tensor, "e r n"], scaled: Float[Tensor, "batch a b"], at: Tile
    ) -> Float[Tensor, "e r n"]:
        """`weight` plus tile `at` of the edit whose core went into `scaled`."""

    @abstractmethod
    def project(self, stored: Float[Tensor, "e r n"], at: Tile) -> Float64[Tensor, "e k k"]:
        """The share of tile `at` in the core of a stored edit."""

    @abstractmethod
    def spectral(self, seed: int) -> Float64[Tensor, " batch"]:
        """The spectral norm of each matrix of the edit."""


class LowRank(AbstractEdit):
    """`left @ diag(values) @ right`, with orthonormal (batch, m, k) and (batch, k, n) outer factors."""

    def __init__(self, left: Tensor, values: Tensor, right: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._left, self._right = left.double(), right.to(dtype)
        self.core = torch.diag_embed(values.double())
        double = right.double()
        self.target = self._left.mT @ self._left @ self.core @ (double @ double.mT)

    def scaled(self, core: Tensor) -> Tensor:
        """`left @ core`."""
        return (self._left @ core).to(self._right.dtype)

    def add(self, weight: Tensor, scaled: Tensor, at: Tile) -> Tensor:
        """`weight + left @ core @ right`."""
        return torch.baddbmm(weight, scaled[at], self._right[at[0]])

    def project(self, stored: Tensor, at: Tile) -> Tensor:
        """`left^T @ stored @ right^T`."""
        return self._left[at].mT @ torch.bmm(stored, self._right[at[0]].mT).double()

    def spectral(self, seed: int) -> Tensor:
        """That of the core, since the factors are orthonormal."""
        del seed
        return torch.linalg.matrix_norm(self.target, 2)


class Dense(AbstractEdit):
    """An edit of full rank: its core is one number, the length along the edit's own direction."""

    def __init__(self, edit: Tensor, dtype: torch.dtype) -> None:
        self._edit, self.dtype = edit, dtype
        energy = edit.new_zeros(edit.shape[0], dtype=torch.float64)
        for at in tiles(edit.shape):
            energy[at[0]] += edit[at].double().square().sum((-2, -1))
        self.core = self.target = energy.sqrt()[:, None, None]
        self._length = torch.where(energy > 0, energy.sqrt(), 1.0)[:, None, None]

    def scaled(self, core: Tensor) -> Tensor:
        """The gain: 1 for the edit as intended."""
        return (core / self._length).to(self.dtype)

    def add(self, weight: Tensor, scaled: Tensor, at: Tile) -> Tensor:
        """`weight + gain * edit`."""
        return torch.addcmul(weight, self._edit[at].to(self.dtype), scaled[at[0]])

    def project(self, stored: Tensor, at: Tile) -> Tensor:
        """`<stored, edit> / ||edit||`."""
        return (stored.double() * self._edit[at]).sum((-2, -1), keepdim=True) / self._length[at[0]]

    def spectral(self, seed: int) -> Tensor:
        """By the same estimate as the noise."""
        return norms(self._tile, self._edit.shape, self.dtype, seed, self._edit.device)[1]

    def _tile(self, at: Tile) -> Tensor:
        return self._edit[at].to(self.dtype)


@dataclass(frozen=True)
class Pass:
    """A weight, an edit of it and where to store their sum; all (batch, m, n)."""

    anchor: Tensor
    edit: AbstractEdit
    out: Tensor
    rounder: Rounder = nearest

    def write(
        self, core: Float64[Tensor, "batch k k"], active: Bool[Tensor, " batch"]
    ) -> Float64[Tensor, "batch k k"]:
        """The core of what is stored after rounding anchor + edit(`core`) into `out`; zero where not `active`.

        A tile without an active matrix is left as it is.
        """
        scaled, found = self.edit.scaled(core), torch.zeros_like(core)
        _, m, n = self.anchor.shape
        for at in tiles(self.anchor.shape):
            if not active[at[0]].any():
                continue
            weight = self.anchor[at].to(self.edit.dtype)
            target, first = self.edit.add(weight, scaled, at), (at[0].start * m + at[1].start) * n
            self.out[at] = self.rounder(target, self.out.dtype, first)
            found[at[0]] += self.edit.project(self.out[at].to(self.edit.dtype) - weight, at)
        return found

    def noise(self) -> Callable[[Tile], Tensor]:
        """Tiles of what was stored minus what was meant."""
        scaled = self.edit.scaled(self.edit.core).neg_()

        def tile(at: Tile) -> Tensor:
            stored = self.out[at].to(self.edit.dtype) - self.anchor[at].to(self.edit.dtype)
            return self.edit.add(stored, scaled, at)

        return tile

    def changed(self) -> int:
        """How many entries of `out` are not the anchor's own, rounded to nearest."""
        different = 0
        for at in tiles(self.anchor.shape):
            own = nearest(self.anchor[at], self.out.dtype)
            # Unequal floats never differ by zero; and this is four times as fast as comparing bfloat16.
            different += int(torch.count_nonzero((self.out[at] - own).bool()))
        return different


def norms(
    tile: Callable[[Tile], Tensor], shape: torch.Size, dtype: torch.dtype, seed: int, device: torch.device
) -> tuple[Float64[Tensor, " batch"], Float64[Tensor, " batch"]]:
    """Squared Frobenius norm and spectral norm of each (m, n) matrix of a batch that is given tile by tile.

    The spectral norm is the largest stretch found in a Krylov space of the Gram matrix (3 passes, a seeded block of
    8): never too large, 4 to 8 % too small on noise without structure, exact where n <= 24.
    """
    batch, _, n = shape
    exact = n <= _PASSES * _WIDTH
    block = torch.eye(n, dtype=torch.float64).expand(batch, n, n) if exact else _start(batch, n, seed)
    block = block.to(device)
    basis = images = block[..., :0]
    for _ in range(1 if exact else _PASSES):
        image, energy = _gram(tile, shape, block.to(dtype))
        basis, images = torch.cat((basis, block), -1), torch.cat((images, image), -1)
        block = _orthogonal(image, basis)
    stretch: Tensor = torch.linalg.matrix_norm(images, 2)
    return energy, stretch.sqrt()


def _start(batch: int, n: int, seed: int) -> Float64[Tensor, "batch n width"]:
    """Orthonormal random columns, the same for every matrix of the batch."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(n, _WIDTH, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(columns).Q.expand(batch, n, _WIDTH)


def _gram(
    tile: Callable[[Tile], Tensor], shape: torch.Size, block: Float[Tensor, "batch n width"]
) -> tuple[Float64[Tensor, "batch n width"], Float64[Tensor, " batch"]]:
    """`A^T A block` and `||A||_F^2`, in one pass over A."""
    image = torch.zeros_like(block.mT, memory_format=torch.contiguous_format)
    energy = image.new_zeros(shape[0], dtype=torch.float64)
    for at in tiles(shape):
        values = tile(at)
        image[at[0]] += torch.bmm(torch.bmm(values, block[at[0]]).mT, values)
        energy[at[0]] += torch.linalg.vector_norm(values, dim=-1).double().square().sum(-1)
    return image.mT.double(), energy


def _orthogonal(
    image: Float64[Tensor, "batch n width"], basis: Float64[Tensor, "batch n total"]
) -> Float64[Tensor, "batch n width"]:
    """Orthonormal columns, orthogonal to `basis`, that continue `image`."""
    # Twice: where `image` adds nothing new, the first round leaves rounding errors that still lean on `basis`.
    for _ in range(2):
        image = torch.linalg.qr(image - basis @ (basis.mT @ image)).Q
    return image
