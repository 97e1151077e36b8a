"""Tiles of a weight: runs of whole rows, by a rule of the shape alone."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

TILE = 1 << 17
"""Entries of a tile: large enough to hide the cost of a call, small enough to stay in cache."""

Tile = tuple[slice, slice]
"""Which matrices, and which of their rows."""


def sides(shape: torch.Size) -> tuple[int, int]:
    """How many matrices of an (E, m, n) weight a tile holds, and how many rows of each."""
    batch, m, n = shape
    rows = max(1, TILE // max(1, n))
    return min(batch, max(1, rows // max(1, m))), min(rows, m)


def tiles(shape: torch.Size) -> Iterator[Tile]:
    """The tiles of an (E, m, n) weight: rows of one matrix, or several whole matrices where they are small."""
    (batch, m, _), (together, rows) = shape, sides(shape)
    for first in range(0, batch, together):
        for row in range(0, m, rows):
            yield slice(first, min(first + together, batch)), slice(row, min(row + rows, m))


def cut(tensor: Float[Tensor, "E *dims"], shape: torch.Size, dim: int = 1) -> list[Tensor]:
    """The tiles of an (E, m, n) weight of that shape in a tensor whose dimension `dim` has m entries, as views.

    In the order of `tiles`; far cheaper than to index them one by one.
    """
    together, rows = sides(shape)
    return [piece for group in tensor.split(together) for piece in group.split(rows, dim)]


def sample(shape: torch.Size, entries: int) -> list[int]:
    """Numbers (in `tiles`) of tiles with at least `entries` of each matrix, spread over its rows; or of all tiles.

    One tile is taken of each run of as many, from a place in the run that changes from run to run, so that weights
    that repeat along the rows (heads) are not met in the same phase each time.
    """
    (_, m, n), (_, rows) = shape, sides(shape)
    count, wanted = -(-m // rows), max(1, -(-entries // (rows * n)))
    bounds = (
        [run * count // wanted for run in range(wanted + 1)] if wanted < count else list(range(count + 1))
    )
    # Multiples of the golden ratio, in 2**-32: as even as a sequence can be.
    chosen = {
        low + ((run * 0x9E3779B9 & 0xFFFFFFFF) * (high - low) >> 32)
        for run, (low, high) in enumerate(pairwise(bounds))
    }
    groups = len(list(tiles(shape))) // count
    return [group * count + number for group in range(groups) for number in sorted(chosen)]
