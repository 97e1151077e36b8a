"""One pass over a weight: add an edit, round once, and see what came of it, tile by tile.

A tile is a fixed number of rows, a rule of the shape alone, so neither the bytes nor the memory (the output and a few
tiles) depend on how the work is spread. What a pass computes of a tile it computes while the tile is in cache, in
buffers that all tiles share; sums that cross tiles are taken in float64, but for the Gram matrix's image.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from surgery.kernels import stretch
from surgery.kernels.backend import choose
from surgery.kernels.edits import AbstractEdit, LowRank
from surgery.kernels.rounders import GRID, Rounder, Stochastic, nearest, to_nearest
from surgery.kernels.tiling import TILE as TILE
from surgery.kernels.tiling import Tile, cut, tiles


@dataclass(frozen=True)
class Figures:
    """What a pass found of each matrix of a batch, with D stored minus anchor and E the intended edit.

    Attributes:
        residual: The intended core minus that of D.
        noise: ||D - E||_F^2.
        anchor: ||anchor||_F^2.
        changed: Entries that are not the anchor's own, rounded to nearest.
        image: (D - E)^T (D - E) `block`, transposed, for the estimate of the spectral norm.
    """

    residual: Float64[Tensor, "batch k k"]
    noise: Float64[Tensor, " batch"]
    anchor: Float64[Tensor, " batch"]
    changed: Float64[Tensor, " batch"]
    image: Float[Tensor, "batch width n"]

    def where(self, chosen: Bool[Tensor, " batch"], other: "Figures") -> "Figures":
        """These figures for the `chosen` matrices and `other` for the rest."""

        def pick(one: Tensor, two: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (one.dim() - 1)), one, two)

        return Figures(
            pick(self.residual, other.residual),
            pick(self.noise, other.noise),
            pick(self.anchor, other.anchor),
            pick(self.changed, other.changed),
            pick(self.image, other.image),
        )


class _Buffers:
    """Room for one tile: the weight, the noise, and what is stored in the output's dtype."""

    def __init__(self, room: Tensor, stored: Tensor, shape: torch.Size) -> None:
        self.weight, self.noise = room[:, : shape.numel()].view(2, *shape)
        self.stored = stored[: shape.numel()].view(shape)


class Pass:
    """A weight, an edit of it and where to store their sum; all (batch, m, n).

    Args:
        anchor: The weight.
        edit: What is added.
        out: Where the sum is stored.
        rounder: How to round.
    """

    def __init__(
        self,
        anchor: Float[Tensor, "batch m n"],
        edit: AbstractEdit,
        out: Float[Tensor, "batch m n"],
        rounder: Rounder = to_nearest,
    ) -> None:
        self.anchor, self.edit, self.out = anchor, edit, out
        self.rounder, self._shape, self._tiles = rounder, anchor.shape, list(tiles(anchor.shape))
        self._anchors, self._outs = cut(anchor, self._shape), cut(out, self._shape)
        self._intended = cut(edit.scaled(edit.core), self._shape)
        self._twin = _Twin.of(self, edit)
        largest = self._anchors[0].numel()
        self._room = torch.empty(2, largest, dtype=edit.dtype, device=out.device)
        self._stored = torch.empty(largest, dtype=out.dtype, device=out.device)
        self._shaped: dict[torch.Size, _Buffers] = {}

    def write(
        self,
        core: Float64[Tensor, "batch k k"],
        active: Bool[Tensor, " batch"],
        block: Float64[Tensor, "batch n width"],
    ) -> Figures:
        """Round anchor + edit(`core`) into `out`; figures of what is stored, of no meaning where not `active`.

        A tile without an active matrix is left as it is. `block` is for the figures' `image`.
        """
        if self._twin:
            return self._twin.write(core, active, block)
        (batch, m, n), width, probe = self._shape, block.shape[-1], self.edit.probe(block)
        scaled, image = cut(self.edit.scaled(core), self._shape), probe.new_zeros(batch, width, n)
        products = probe.new_zeros(batch, m, self.edit.columns + width)
        rows, columns = cut(products, self._shape), cut(products[..., -width:].mT, self._shape, dim=2)
        found = []
        for number, at in self._active(active):
            buffers, stored = self._buffers(number), self._outs[number]
            energy = _energy(self._load(number, buffers), buffers.noise)
            change = self._round(number, stored, scaled[number], buffers)
            changed = self._changed(stored, buffers)
            noise = self._noise(number, change)
            found.append((at[0], _square(noise), energy, changed))
            self.edit.multiply(noise, buffers.weight, at, _of(probe, at), rows[number])
            _of(image, at).baddbmm_(columns[number], noise)
        noise_energy, energy, changed = _totals(found, products)
        return Figures(-self.edit.kept(products), noise_energy, energy, changed, image)

    def look(
        self,
        core: Float64[Tensor, "batch k k"],
        active: Bool[Tensor, " batch"],
        some: Sequence[int] | None = None,
    ) -> Float64[Tensor, "batch k k"]:
        """The core of what `write` would store, or of some tiles of it (their numbers), stored nowhere.

        At half the cost of `write`.
        """
        if self._twin and some is None:
            return self._twin.look(core, active)
        scaled, probe = cut(self.edit.scaled(core), self._shape), self.edit.probe(self._nothing())
        products = probe.new_zeros(*self._shape[:2], self.edit.columns)
        rows = cut(products, self._shape)
        for number, at in self._active(active, some):
            buffers = self._buffers(number)
            self._load(number, buffers)
            change = self._round(number, buffers.stored, scaled[number], buffers)
            self.edit.multiply(change, buffers.weight, at, _of(probe, at), rows[number])
        return self.edit.kept(products)

    def start(self, core: Float64[Tensor, "batch k k"], seed: int) -> Float64[Tensor, "batch n width"]:
        """The block for `write` (`stretch.start`), from the noise that it would store in a few rows."""
        scaled = cut(self.edit.scaled(core), self._shape)

        def noise(number: int, buffers: _Buffers) -> Tensor:
            self._load(number, buffers)
            return self._noise(number, self._round(number, buffers.stored, scaled[number], buffers))

        return stretch.start(partial(self._gram, noise), self._shape, seed, self.out.device)

    def largest(self, block: Float64[Tensor, "batch n width"], figures: Figures) -> Float64[Tensor, " batch"]:
        """The spectral norm of the noise of what was stored, from its figures and the block they were made with."""

        def noise(number: int, buffers: _Buffers) -> Tensor:
            self._load(number, buffers)
            return self._noise(number, self._change(self._outs[number], buffers))

        image = figures.image.mT.double()
        return stretch.largest(partial(self._gram, noise), self._shape, block, image)

    def _gram(self, noise: Callable[[int, _Buffers], Tensor], block: Tensor, some: Sequence[int]) -> Tensor:
        """`N^T N block` over some tiles (their numbers) of the noise N."""
        columns = block.to(self.edit.dtype).contiguous()
        image = torch.zeros_like(columns.mT, memory_format=torch.contiguous_format)
        for number in some:
            values, at = noise(number, self._buffers(number)), self._tiles[number]
            _of(image, at).baddbmm_(torch.bmm(values, _of(columns, at)).mT, values)
        return image.mT.double()

    def _nothing(self) -> Tensor:
        """A block without columns."""
        return self.edit.core.new_empty(self._shape[0], self._shape[2], 0)

    def cast(self) -> float:
        """||anchor||_F^2; `out` becomes the anchor itself, rounded to nearest."""
        found = []
        for number, at in enumerate(self._tiles):
            buffers = self._buffers(number)
            weight = self._load(number, buffers)
            self._outs[number].copy_(to_nearest(weight, self.out.dtype))
            found.append((at[0], _energy(weight, buffers.noise)))
        return float(_totals(found, self.anchor)[0].sum())

    def _active(self, active: Tensor, some: Sequence[int] | None = None) -> Iterator[tuple[int, Tile]]:
        wanted = active.tolist()
        every = ((number, self._tiles[number]) for number in some or range(len(self._tiles)))
        return ((number, at) for number, at in every if any(wanted[at[0]]))

    def _buffers(self, number: int) -> _Buffers:
        shape = self._anchors[number].shape
        if shape not in self._shaped:
            self._shaped[shape] = _Buffers(self._room, self._stored, shape)
        return self._shaped[shape]

    def _load(self, number: int, buffers: _Buffers) -> Tensor:
        """The anchor in its buffer."""
        return buffers.weight.copy_(self._anchors[number])

    def _round(self, number: int, stored: Tensor, scaled: Tensor, buffers: _Buffers) -> Tensor:
        """The rounded sum of the anchor loaded and an edit into `stored`; stored minus anchor."""
        (_, m, n), at = self._shape, self._tiles[number]
        self.edit.add(buffers.weight, scaled, at, buffers.noise)
        start = (at[0].start * m + at[1].start) * n
        stored.copy_(self.rounder(buffers.noise, stored.dtype, start))
        return self._change(stored, buffers)

    def _change(self, stored: Tensor, buffers: _Buffers) -> Tensor:
        """Stored minus anchor, in the buffer of the noise."""
        return buffers.noise.copy_(stored).sub_(buffers.weight)

    def _changed(self, stored: Tensor, buffers: _Buffers) -> Tensor:
        """How many entries of each matrix are not the anchor's own, rounded to nearest; spoils its buffer."""
        if stored.dtype == self.anchor.dtype:
            # As numbers: a comparison of bfloat16 takes ten times as long, a sum of truth values three times.
            different = torch.ne(buffers.noise, 0, out=buffers.weight)
        else:
            different = torch.ne(stored, nearest(buffers.weight, stored.dtype))
        return different.sum((-2, -1), keepdim=True)

    def _noise(self, number: int, change: Tensor) -> Tensor:
        """The change minus the intended edit, in place."""
        # From the sum before rounding it would be cheaper by a product, and wrong for edits below float32's own step.
        self.edit.subtract(change, self._intended[number], self._tiles[number])
        return change


class _Twin:
    """The passes of an edit of low rank in Triton, which adds in float32; whole matrices, not tiles."""

    def __init__(self, job: Pass, edit: LowRank) -> None:
        rounder = job.rounder
        self._job, self._edit = job, edit
        self._words = rounder.words if isinstance(rounder, Stochastic) else None
        self._intended = edit.scaled(edit.core)

    @classmethod
    def of(cls, job: Pass, edit: AbstractEdit) -> "_Twin | None":
        """None where torch is to compute (`backend.choose`)."""
        if not isinstance(edit, LowRank):
            choose(job.anchor, job.out, lacking="edits of full rank are stored by torch alone")
            return None
        return cls(job, edit) if choose(job.anchor, job.out, edit.right) == "triton" else None

    def write(self, core: Tensor, active: Tensor, block: Tensor) -> Figures:
        """`Pass.write`."""
        from surgery.kernels import rank_update_triton

        width, job = block.shape[-1], self._job
        sums = self._update(core, active, self._edit.probe(block), self._intended)
        factor = sums.products[..., -width:]
        image = rank_update_triton.image(job.anchor, job.out, self._intended, self._edit.right, factor)
        noise, anchor, changed = (one.sum(-1) for one in (sums.noise, sums.anchor, sums.changed.double()))
        return Figures(-self._edit.kept(sums.products), noise, anchor, changed, image)

    def look(self, core: Tensor, active: Tensor) -> Tensor:
        """`Pass.look` over all rows."""
        return self._edit.kept(self._update(core, active, self._edit.right.mT, None).products)

    def _update(self, core: Tensor, active: Tensor, probe: Tensor, intended: Tensor | None) -> Any:
        from surgery.kernels import rank_update_triton

        return rank_update_triton.update(
            self._job.anchor,
            self._edit.scaled(core),
            self._edit.right,
            probe,
            active,
            self._job.out,
            intended=intended,
            grid=GRID[self._job.out.dtype],
            words=self._words,
        )


def _of(stack: Tensor, at: Tile) -> Tensor:
    """The matrices of a tile; without an index, which takes as long as a product of small ones, if that is all."""
    return stack if at[0].stop - at[0].start == len(stack) else stack[at[0]]


def _energy(values: Float[Tensor, "e r n"], room: Float[Tensor, "e r n"]) -> Float[Tensor, "e 1 1"]:
    """The squared Frobenius norm of each matrix of a tile, to 1e-7; spoils `room`."""
    return torch.mul(values, values, out=room).sum((-2, -1), keepdim=True)


def _square(values: Float[Tensor, "e r n"]) -> Float[Tensor, "e 1 1"]:
    """The same to 1e-5, in float32, and in less than half the time."""
    row = values.view(len(values), 1, -1)
    return torch.bmm(row, row.mT)


def _totals(found: list[tuple[Any, ...]], stack: Tensor) -> tuple[Float64[Tensor, " batch"], ...]:
    """From (matrices, (e, 1, 1) figures ...) of each tile the sums over each matrix of a stack."""
    totals = [stack.new_zeros(len(stack), dtype=torch.float64) for _ in found[0][1:]]
    for matrices, tiles_of_them in groupby(found, key=itemgetter(0)):
        for total, figures in zip(totals, zip(*(one[1:] for one in tiles_of_them), strict=True), strict=True):
            total[matrices] = torch.cat(figures, -1).double().sum((-2, -1))
    return tuple(totals)
