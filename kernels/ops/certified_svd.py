"""Leading singular triplets of a batch of matrices, iterated until residual bounds certify them.

All matrices of a batch share the iteration; each has its own verdict. The size of the work is judged from small
matrices after each product; once they promise success the residuals are formed in full and have the
last word.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from surgery.kernels import residual_bounds
from surgery.kernels.block_krylov import Krylov, Operator, Ritz, Stored, Triplets
from surgery.kernels.orthonormalise import polish
from surgery.kernels.residual_bounds import Bounds, Residuals

ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}

# Up to this shorter side the full decomposition costs no more than the iteration.
_SMALL = 128
# Up to this shorter side a full decomposition is made in float64 whatever the input.
_WIDE = 1024
# Columns multiplied at once: at least this many, and this many beyond the rank.
_BLOCK, _OVERSAMPLING = 16, 8
# Products after which the small problem is first solved (exact low rank shows at once), solved again, and the
# largest growth of their number in between: solving it costs the cube of the dimension.
_LOOKS, _GROWTH = (3, 6), 1.25
# Further passes granted to turn a certified energy into a certified subspace, and how near that must be.
_GRACE, _NEAR = 1, 3.0
# Growth of roundoff, where products are made two at a time, beyond which they are made one by one.
_USUAL_AMPLIFICATION = 8.0
# Products after which spikes above the hard threshold have shown themselves: they stand 15 % above the bulk.
_LOOK = 8


class Verdict(NamedTuple):
    """What is known about one matrix's triplets; the fields of `surgery.spectral.Certificate`."""

    error: float
    energy_deficit: float
    criterion: str
    passes: int
    dimension: int


@dataclass(frozen=True)
class Decomposition:
    """Leading triplets of each matrix in float64, with a verdict each."""

    left: Float[Tensor, "batch m k"]
    values: Float[Tensor, "batch k"]
    right: Float[Tensor, "batch n k"]
    verdicts: tuple[Verdict, ...]


@dataclass
class _Patience:
    """The stopping rule: subspace within the tolerance, or energy within its square and the subspace out of reach."""

    tol: float
    since: int | None = None

    def settled(self, reached: Bounds, passes: int) -> Bool[ndarray, " batch"]:
        """Which matrices need no further pass."""
        captured = reached.energy_deficit <= self.tol**2
        resolved = reached.error <= self.tol
        if self.since is None and (captured | resolved).all():
            self.since = passes
        late = self.since is not None and passes >= self.since + _GRACE
        done: ndarray = resolved | (captured & ((reached.error > _NEAR * self.tol) | late))
        return done


@dataclass
class _Schedule:
    """When to solve the small problem: at the first looks, then when residuals are expected to be small enough."""

    due: int = _LOOKS[0]
    before: tuple[int, float] | None = None

    def after(self, passes: int, missing: float) -> None:
        """Set the next look; `missing` is how many times too large the residuals' energy is."""
        sooner = [look for look in _LOOKS if look > passes]
        self.due = sooner[0] if sooner else self._expected(passes, missing)
        self.before = (passes, missing)

    def _expected(self, passes: int, missing: float) -> int:
        latest = math.ceil(_GROWTH * passes)
        if missing <= 1 or self.before is None:
            return passes + 1
        rate = math.log(self.before[1] / missing) / (passes - self.before[0])
        wait = math.log(missing) / rate if rate > 0 else math.inf
        return max(passes + 1, math.ceil(min(latest, passes + wait)))


def certified(
    delta: Float[Tensor, "batch m n"],
    energy: Float[Tensor, " batch"],
    rank: int,
    generator: torch.Generator,
    tol: float,
) -> Decomposition:
    """The `rank` leading triplets, by iteration where that certifies them and in full elsewhere.

    Args:
        delta: Finite matrices, float32 or float64, with squares in range.
        energy: Their squared Frobenius norms.
        rank: From 1 to min(m, n).
        generator: Source of the random start, on the CPU.
        tol: Relative error of the subspace, or square root of the relative energy deficit, to certify.
    """
    if is_small(min(delta.shape[-2:]), rank):
        return exact(delta, energy, rank)
    found, settled = iterated(Stored(delta), energy, rank, generator, tol)
    stuck = (~settled).nonzero().flatten()
    if len(stuck) == 0:
        return found
    return _replaced(found, stuck, exact(delta[stuck], energy[stuck], rank))


def is_small(short: int, rank: int) -> bool:
    """Whether matrices with this shorter side are decomposed in full from the outset."""
    return short <= _SMALL or 3 * _block(rank) > _room(short)


def exact(delta: Float[Tensor, "batch m n"], energy: Float[Tensor, " batch"], rank: int) -> Decomposition:
    """The `rank` leading triplets by full decomposition, bounded by their measured residuals.

    In float64 up to a shorter side of 1024, beyond that in the dtype of `delta`.
    """
    short = min(delta.shape[-2:])
    work = delta.double() if short <= _WIDE else delta
    left, values, rows = torch.linalg.svd(work, full_matrices=False)
    count = min(rank + 1, short)
    left, values, right = (
        left[..., :count].mT.contiguous(),
        values[..., :count].double(),
        rows[..., :count, :],
    )
    triplets = _measured(work, left, values, right.contiguous())
    reached = _judge(triplets, energy, rank, ROUNDOFF[work.dtype], ROUNDOFF[delta.dtype])
    verdicts = [Verdict(*pair, "exact", 0, short) for pair in zip(*_lists(reached), strict=True)]
    return _first(triplets, rank, verdicts)


def prominent_values(
    delta: Float[Tensor, "batch m n"], count: int, generator: torch.Generator
) -> Float[Tensor, "batch l"]:
    """Leading singular values, `count` at least or all of them, good to where they stand clear of the rest.

    From a fixed number of products; those inside a bulk are too small by some per cent.
    """
    short = min(delta.shape[-2:])
    block = _block(count)
    if short <= _SMALL or (_LOOK // 2 + 1) * block > short:
        values: Tensor = torch.linalg.svdvals(delta.double() if short <= _WIDE else delta)
        return values.double()
    state = Krylov(Stored(delta), block, generator, most=_USUAL_AMPLIFICATION)
    for _ in range(_LOOK):
        state.advance()
    return state.ritz(block).values


def _block(rank: int) -> int:
    """Columns multiplied at once: enough to see a cluster around the rank as one."""
    return max(_BLOCK, rank + _OVERSAMPLING)


def _room(short: int) -> int:
    """Krylov dimension beyond which a full decomposition is cheaper."""
    return short // 2


def _amplification(dtype: torch.dtype, tol: float) -> float:
    """Growth of roundoff that leaves the bounds an order of magnitude below the tolerance."""
    return min(_USUAL_AMPLIFICATION, tol / (10 * residual_bounds.PRODUCT_NOISE * ROUNDOFF[dtype]))


def iterated(
    operator: Operator,
    energy: Float[Tensor, " batch"],
    rank: int,
    generator: torch.Generator,
    tol: float,
) -> tuple[Decomposition, Bool[Tensor, " batch"]]:
    """Triplets once all are certified or the room is used up, and which of them are certified.

    Arguments as for `certified`; the matrices are known by their products, and are not `is_small`.
    """
    state = Krylov(operator, _block(rank), generator, most=_amplification(operator.dtype, tol))
    patience, schedule = _Patience(tol), _Schedule()
    roundoff, room = ROUNDOFF[operator.dtype], _room(min(operator.shape[1:]))
    while True:
        state.advance()
        full = state.dimension + state.block > room
        if state.passes < schedule.due and not full:
            continue
        found = state.ritz(state.block)
        promised = _promises(found, energy, rank, roundoff, patience, schedule, state.passes)
        if not (full or promised):
            continue
        triplets = state.triplets(found)
        reached = _judge(triplets, energy, rank, roundoff * state.amplification, roundoff)
        settled = patience.settled(reached, state.passes)
        if full or bool(settled.all()):
            verdicts = _verdicts(state, reached, tol)
            return _first(triplets, rank, verdicts), torch.from_numpy(settled).to(energy.device)


def _promises(
    found: Ritz,
    energy: Tensor,
    rank: int,
    roundoff: float,
    patience: _Patience,
    schedule: _Schedule,
    passes: int,
) -> bool:
    """Whether the residuals that the recurrences predict would settle every matrix; if not, when to look again."""
    gram = found.leak.mT @ found.leak
    missed = torch.diagonal(gram, dim1=-2, dim2=-1)[:, :rank].sum(-1)
    # Every bound on the energy deficit exceeds this: most looks need no closer one.
    least = patience.tol**2 * found.values[:, :rank].square().sum(-1)
    missing = float((missed / least).nan_to_num(0.0).max())
    schedule.after(passes, missing)
    if missing > 1:
        return False
    values = found.values.numpy(force=True)
    predicted = Residuals(
        values, gram.numpy(force=True), np.zeros_like(values), energy.numpy(force=True), roundoff
    )
    return bool(patience.settled(residual_bounds.bounds(predicted, rank, roundoff), passes).all())


def _judge(triplets: Triplets, energy: Tensor, rank: int, roundoff: float, stored: float) -> Bounds:
    """Bounds from measured residuals; past the last singular value there is a zero without residual."""
    gram = triplets.inner_residual @ triplets.inner_residual.mT
    outer = torch.linalg.vector_norm(triplets.outer_residual, dim=-1)
    lacking = max(0, rank + 1 - triplets.values.shape[-1])
    pad = torch.nn.functional.pad
    known = Residuals(
        pad(triplets.values, (0, lacking)).numpy(force=True),
        pad(gram, (0, lacking, 0, lacking)).numpy(force=True),
        pad(outer, (0, lacking)).numpy(force=True),
        energy.numpy(force=True),
        roundoff,
    )
    return residual_bounds.bounds(known, rank, stored)


def _measured(delta: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Triplets:
    """Triplets with residuals from one product on either side; vectors are given and returned as rows."""
    operator = Stored(delta)
    image, coimage = operator.times(right).double(), operator.transposed_times(left).double()
    left, right = left.double(), right.double()
    straight, upright = polish(right), polish(left)
    left, coimage = upright @ left, upright @ coimage
    right, image = straight @ right, straight @ image
    scale = values.unsqueeze(-1)
    return Triplets(left, values, right, coimage - right * scale, image - left * scale)


def _verdicts(state: Krylov, reached: Bounds, tol: float) -> list[Verdict]:
    return [
        Verdict(error, deficit, "subspace" if error <= tol else "energy", state.passes, state.dimension)
        for error, deficit in zip(*_lists(reached), strict=True)
    ]


def _lists(reached: Bounds) -> tuple[list[float], list[float]]:
    return reached.error.tolist(), reached.energy_deficit.tolist()


def _first(triplets: Triplets, rank: int, verdicts: list[Verdict]) -> Decomposition:
    """The first `rank` triplets."""
    left, right = triplets.left[:, :rank].mT, triplets.right[:, :rank].mT
    return Decomposition(left, triplets.values[..., :rank], right, tuple(verdicts))


def _replaced(found: Decomposition, places: Tensor, better: Decomposition) -> Decomposition:
    """`found` with `better` at `places` of the batch."""
    verdicts = list(found.verdicts)
    for place, verdict in zip(places.tolist(), better.verdicts, strict=True):
        verdicts[place] = verdict
    return Decomposition(
        found.left.index_copy(0, places, better.left),
        found.values.index_copy(0, places, better.values),
        found.right.index_copy(0, places, better.right),
        tuple(verdicts),
    )
