"""How long a ground's part of the study takes from nothing: the times of its cells, in the order it runs them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.evidence.columns import COLUMNS
from benchmarks.evidence.grounds import Ground
from benchmarks.evidence.keys import BUILD

Known = Mapping[str, Mapping[str, Mapping[str, Any]]]


def from_nothing(ground: Ground, known: Known, processes: int) -> float:
    """Hours of wall time of a run that has none of the cells, without what is made before the first of them.

    A process waits where a wave has nothing left for it; so this is no less than the sum over the processes' number.

    Args:
        ground: Whose waves, each of models, searches and what is measured of the models.
        known: Cells by row or search, and by column or sweep; `wall` in seconds.
        processes: Commands side by side; models are built one after the other where the ground has them so.
    """
    builders = 1 if ground.one_by_one else processes
    return math.fsum(_wave(ground, known, wave, builders, processes) for wave in ground.waves) / 3600


def _wave(ground: Ground, known: Known, names: Sequence[str], builders: int, processes: int) -> float:
    """Seconds of one wave; a model waits for what it starts from and what it is chosen by, but is not timed so."""
    rows = [known.get(name, {}) for name in names if name not in ground.searches]
    searches = [known.get(name, {}) for name in names if name in ground.searches]
    return math.fsum((
        _together((row[BUILD] for row in rows if BUILD in row), builders),
        _together((cell for search in searches for cell in search.values()), processes),
        _together((row[column.name] for row in rows for column in COLUMNS if column.name in row), processes),
    ))  # fmt: skip


def _together(cells: Iterable[Mapping[str, Any]], processes: int) -> float:
    """Seconds until the last ends of cells that are begun in this order, each by the first process that is free."""
    free = [0.0] * processes
    for cell in cells:
        first = free.index(min(free))
        free[first] += cell.get("wall", 0.0)
    return max(free)
