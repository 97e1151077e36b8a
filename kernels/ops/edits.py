"""Intended edits, tile by tile: of low rank as factors, or dense."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from surgery.kernels import stretch
from surgery.kernels.tiling import Tile, tiles


class AbstractEdit(ABC):
    """An intended edit E of a batch of matrices, written in a k x k core per matrix, in float64.

    `core` gives E itself. A stored edit D has a core too, its part in E's own directions: `target` if D = E. With
    that core, <D, E> = sum(core * core of D), and ||E||_F^2 = sum(core * target).
    """

    core: Float64[Tensor, "batch k k"]
    target: Float64[Tensor, "batch k k"]
    within: Float64[Tensor, "batch k k"]
    """What `share` of some rows times is the core that E has in them alone."""
    dtype: torch.dtype
    """The dtype sums are taken in."""
    columns: int
    """Columns that `multiply` puts before those of the block."""

    @abstractmethod
    def scaled(self, core: Float64[Tensor, "batch k k"]) -> Float[Tensor, "batch m b"]:
        """What `add` and `subtract` need of `core`, made once for all tiles so that no tile rounds it its own way."""

    @abstractmethod
    def add(
        self,
        weight: Float[Tensor, "e r n"],
        scaled: Float[Tensor, "e r b"],
        at: Tile,
        out: Float[Tensor, "e r n"],
    ) -> None:
        """`weight` plus tile `at` of an edit into `out`; `scaled` is that tile's part of what its core became."""

    @abstractmethod
    def subtract(self, values: Float[Tensor, "e r n"], scaled: Float[Tensor, "e r b"], at: Tile) -> None:
        """Take tile `at` of an edit from `values`, in place."""

    @abstractmethod
    def probe(self, block: Float64[Tensor, "batch n width"]) -> Float[Tensor, "batch n total"]:
        """The columns that `multiply` needs for `block`."""

    @abstractmethod
    def multiply(
        self,
        values: Float[Tensor, "e r n"],
        room: Float[Tensor, "e r n"],
        at: Tile,
        probe: Float[Tensor, "e n total"],
        out: Float[Tensor, "e r both"],
    ) -> None:
        """What `kept` needs of `values`, rows of tile `at`, and values @ block, into `out`; `room` is spoilt."""

    @abstractmethod
    def kept(self, products: Float[Tensor, "batch m both"]) -> Float64[Tensor, "batch k k"]:
        """The core of matrices, from the results of `multiply` for all their rows; zero for rows left out."""

    @abstractmethod
    def share(self, some: Sequence[int]) -> Float64[Tensor, "batch k k"]:
        """What the rows in some tiles (their numbers) alone make of a core: the identity if that is all of them."""

    @abstractmethod
    def spectral(self, seed: int) -> Float64[Tensor, " batch"]:
        """The spectral norm of each matrix of the edit."""


class LowRank(AbstractEdit):
    """`left @ diag(values) @ right`, with orthonormal (batch, m, k) and (batch, k, n) outer factors."""

    def __init__(self, left: Tensor, values: Tensor, right: Tensor, dtype: torch.dtype) -> None:
        self.dtype, self.columns = dtype, values.shape[-1]
        self._shape = torch.Size((*left.shape[:2], right.shape[-1]))
        self._left, self.right = left.double(), right.to(dtype)
        self.core = torch.diag_embed(values.double())
        double = right.double()
        self.within = self.core @ (double @ double.mT)
        self.target = self._left.mT @ self._left @ self.within

    def scaled(self, core: Tensor) -> Tensor:
        """`left @ core`."""
        return (self._left @ core).to(self.dtype)

    def add(self, weight: Tensor, scaled: Tensor, at: Tile, out: Tensor) -> None:
        """`weight + left @ core @ right`."""
        torch.baddbmm(weight, scaled, self.right[at[0]], out=out)

    def subtract(self, values: Tensor, scaled: Tensor, at: Tile) -> None:
        """`values - left @ core @ right`."""
        values.baddbmm_(scaled, self.right[at[0]], alpha=-1)

    def probe(self, block: Tensor) -> Tensor:
        """The right factor and the block."""
        return torch.cat((self.right.mT, block.to(self.dtype)), -1)

    def multiply(self, values: Tensor, room: Tensor, at: Tile, probe: Tensor, out: Tensor) -> None:
        """`values @ (right^T, block)`."""
        del room, at
        torch.bmm(values, probe, out=out)

    def kept(self, products: Tensor) -> Tensor:
        """`left^T values right^T`."""
        return self._left.mT @ products[..., : self.columns].double()

    def share(self, some: Sequence[int]) -> Tensor:
        """`left^T left` over some rows."""
        gram = torch.zeros_like(self.core)
        for at in _chosen(self._shape, some):
            gram[at[0]] += self._left[at].mT @ self._left[at]
        return gram

    def spectral(self, seed: int) -> Tensor:
        """That of the core, since the factors are orthonormal."""
        del seed
        return torch.linalg.matrix_norm(self.target, 2)


class Dense(AbstractEdit):
    """An edit of full rank: its core is one number, the length along the edit's own direction."""

    columns = 1

    def __init__(self, edit: Tensor, dtype: torch.dtype) -> None:
        self._edit, self.dtype = edit, dtype
        energy = self._energy(tiles(edit.shape))
        self.core = self.target = self.within = energy.sqrt()[:, None, None]
        self._length = torch.where(energy > 0, energy.sqrt(), 1.0)[:, None, None]

    def scaled(self, core: Tensor) -> Tensor:
        """The gain, in every row: 1 for the edit as intended."""
        return (core / self._length).to(self.dtype).expand(-1, self._edit.shape[1], 1)

    def add(self, weight: Tensor, scaled: Tensor, at: Tile, out: Tensor) -> None:
        """`weight + gain * edit`."""
        torch.addcmul(weight, self._edit[at].to(self.dtype), scaled, out=out)

    def subtract(self, values: Tensor, scaled: Tensor, at: Tile) -> None:
        """`values - gain * edit`."""
        values.addcmul_(self._edit[at].to(self.dtype), scaled, value=-1)

    def probe(self, block: Tensor) -> Tensor:
        """The block."""
        return block.to(self.dtype)

    def multiply(self, values: Tensor, room: Tensor, at: Tile, probe: Tensor, out: Tensor) -> None:
        """`<values, edit>` of each row, then `values @ block`."""
        out[..., 1:] = torch.bmm(values, probe)
        out[..., :1] = room.copy_(self._edit[at]).mul_(values).sum(-1, keepdim=True)

    def kept(self, products: Tensor) -> Tensor:
        """`<values, edit> / ||edit||`."""
        return products[..., :1].double().sum(-2, keepdim=True) / self._length

    def share(self, some: Sequence[int]) -> Tensor:
        """The part of the energy that lies in some rows."""
        return self._energy(_chosen(self._edit.shape, some))[:, None, None] / self._length.square()

    def spectral(self, seed: int) -> Tensor:
        """By the same estimate as the noise."""
        shape = self._edit.shape
        block = stretch.start(self._gram, shape, seed, self._edit.device)
        return stretch.largest(self._gram, shape, block, self._gram(block, range(len(list(tiles(shape))))))

    def _gram(self, block: Tensor, some: Sequence[int]) -> Tensor:
        columns = block.to(self.dtype).contiguous()
        image = torch.zeros_like(columns.mT, memory_format=torch.contiguous_format)
        for at in _chosen(self._edit.shape, some):
            values = self._edit[at].to(self.dtype)
            image[at[0]].baddbmm_(torch.bmm(values, columns[at[0]]).mT, values)
        return image.mT.double()

    def _energy(self, some: Iterable[Tile]) -> Tensor:
        energy = self._edit.new_zeros(self._edit.shape[0], dtype=torch.float64)
        for at in some:
            energy[at[0]] += self._edit[at].double().square().sum((-2, -1))
        return energy


def _chosen(shape: torch.Size, some: Sequence[int]) -> list[Tile]:
    every = list(tiles(shape))
    return [every[number] for number in some]
