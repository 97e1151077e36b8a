"""Storing an edit in a dtype that is too coarse for it.

A weight W lies on the grid of its dtype; an edit E smaller than half a step is lost when W + E is rounded to nearest.
What was stored, D = round(W + E) - W, is judged by its retention <D, E> / ||E||^2 and its noise ||D - E|| / ||E||.

* nearest: round to nearest, ties to even.
* stochastic: up with probability equal to the fraction; unbiased, noisy; Philox bits keyed by seed and tensor name.
* compensated: round to nearest, but of W + U C V^T, where E = U S V^T and the k x k core C is chosen so that
  U^T D V = S. From C = S the residual S - U^T D V is added to C, times a length learnt from the answers so far; at
  first on a sample of the rows, then, if that misses, on all without storing. Deterministic at a given number of
  threads; at small edits a half to a third of the noise of stochastic. An edit of full rank has no small core: there
  C is one number, the gain along E, chosen so that <D, E> = ||E||^2.
* auto: nearest where it retains at least `ENOUGH`, else compensated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from surgery.errors import InputError, UsageError
from surgery.kernels import philox
from surgery.kernels.edits import AbstractEdit, Dense, LowRank
from surgery.kernels.rounders import Stochastic, to_nearest, wide
from surgery.kernels.store import Figures, Pass
from surgery.kernels.tiling import sample, tiles
from surgery.spectral import Factors

Mode = Literal["auto", "nearest", "compensated", "stochastic"]

ENOUGH = 0.99
"""Retention from which `auto` is content with rounding to nearest."""

HOPELESS = 0.97
"""Retention of a sample below which rounding all to nearest is not tried: the sample errs by a thousandth or so."""

UNEVEN = 2.0
"""How many times more or less of a direction of the edit a sample may hold than of the rows."""

SAMPLE = 1 << 18
"""Entries of a matrix at least in a sample; it also has a sixteenth of them."""

TOLERANCE = 1e-3
"""Compensation stops where the retention of every matrix of a batch is this near to 1, and its core as near as ..."""

CORE_TOLERANCE = 1e-2
"""... ||S - U^T D V||_F is at most this beside ||E||_F: a small part of the noise of rounding, a fifth of E and more
where an edit needs compensation. Nearer than this the core moves by jumps, and steps towards it are hit or miss."""

LIMIT = 50
"""Iterations of compensation at most; the best core is kept. Edits of 1e-4 of the weight take about fifteen."""

PATIENCE = 8
"""Setbacks after which a matrix is left at its best; each halves its steps. Small ones answer in jumps."""


@dataclass(frozen=True)
class Stored:
    """A weight with its edit as stored, and what storing did to the edit.

    With D = `weight` - anchor and E the intended edit, sums run over all matrices of a batch.
    """

    weight: Float[Tensor, "*batch m n"]
    mode: str
    """What was really used: nearest, compensated or stochastic."""
    retention: float
    """<D, E> / ||E||_F^2; 1 where E is zero."""
    noise: float
    """||D - E||_F / ||E||_F; 0 where E is zero."""
    noise_spectral: float
    """||D - E||_2 / ||E||_2, the largest of a batch; estimated, some per cent too small (`kernels.stretch`)."""
    iterations: int
    """Corrections of the core by compensation; 0 for other modes."""
    inner: float
    """<D, E>."""
    edit_energy: float
    """||E||_F^2."""
    noise_energy: float
    """||D - E||_F^2."""
    anchor_energy: float
    """||anchor||_F^2."""
    changed: int
    """Entries whose stored value is not the anchor's own, rounded to nearest."""


def store(
    anchor: Float[Tensor, "*batch m n"],
    edit: Factors | Float[Tensor, "*batch m n"],
    dtype: torch.dtype,
    *,
    mode: Mode,
    seed: int,
    name: str,
    out: Tensor | None = None,
) -> Stored:
    """`anchor + edit` in `dtype`, with one rounding at the end, and how much of the edit that kept.

    The sum is taken in float32, or in float64 if `anchor`, `dtype` or a dense `edit` is wider than 16 bits.
    Memory: the output and a few tiles. An edit of zero gives `anchor` in `dtype`.

    Args:
        anchor: One matrix, or a batch of them (experts).
        edit: The intended edit E, scale included: orthonormal factors or, of full rank, a tensor.
        dtype: What to store: bfloat16, float16, float32 or float64.
        mode: How to round.
        seed: With `name`, the key of the random bits (`stochastic`) and of the norm estimate.
        name: The tensor's name, for that key and for errors.
        out: Where to store: contiguous, of the shape of `anchor`, in `dtype` and on its device; made if None.

    Raises:
        InputError: `anchor` or the result holds infinity or NaN, or the sum overflows `dtype`.
        UsageError: an unknown mode or dtype, or shapes that differ.
    """
    _check(anchor, edit, dtype, mode, name)
    words = philox.key(seed, name)
    seed = words[0] | words[1] << 31
    flat = anchor.reshape(-1, *anchor.shape[-2:])
    rounder = Stochastic(words) if mode == "stochastic" else to_nearest
    job = Pass(flat, _edit(edit, flat, dtype), _place(out, flat, anchor.shape, dtype, name), rounder)
    energy = (job.edit.core * job.edit.target).sum((-2, -1))
    if not energy.any():
        return _unchanged(job, anchor.shape, name)
    result = _fill(job, energy, mode, seed)
    # A value that is not finite makes a sum of squares infinite or no number.
    if not (result.figures.noise + result.figures.anchor).isfinite().all():
        _refuse_overflow(job, name)
    return _judge(job, anchor.shape, energy, result, seed)


def _place(out: Tensor | None, flat: Tensor, shape: torch.Size, dtype: torch.dtype, name: str) -> Tensor:
    """Where to store, as a batch of matrices."""
    if out is None:
        return torch.empty_like(flat, dtype=dtype, memory_format=torch.contiguous_format)
    if (out.shape, out.dtype, out.device) != (shape, dtype, flat.device) or not out.is_contiguous():
        raise UsageError(
            f"{name}: the place for the result is {_label(out.dtype)} {tuple(out.shape)} on {out.device}; needed a "
            f"contiguous {_label(dtype)} {tuple(shape)} on {flat.device}."
        )
    return out.view(flat.shape)


def _check(anchor: Tensor, edit: Factors | Tensor, dtype: torch.dtype, mode: str, name: str) -> None:
    if mode not in get_args(Mode):
        raise UsageError(f"{name}: rounding must be one of {', '.join(get_args(Mode))}, got {mode!r}.")
    for kind in (anchor.dtype, dtype):
        if kind not in _DTYPES:
            raise UsageError(
                f"{name}: cannot add an edit in {_label(kind)}; needed {', '.join(map(_label, _DTYPES))}."
            )
    shape = edit.shape if isinstance(edit, Tensor) else (*edit.left.shape[:-1], edit.right.shape[-1])
    if tuple(shape) != tuple(anchor.shape) or anchor.dim() not in (2, 3) or not anchor.numel():
        raise UsageError(
            f"{name}: the edit has shape {tuple(shape)}, the weight {tuple(anchor.shape)}; "
            "needed the same (m, n) or (experts, m, n), not empty."
        )


_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _edit(edit: Factors | Tensor, flat: Tensor, dtype: torch.dtype) -> AbstractEdit:
    if isinstance(edit, Tensor):
        return Dense(edit.reshape(flat.shape), wide(flat.dtype, dtype, edit.dtype))
    k = edit.values.shape[-1]
    left, right = edit.left.reshape(-1, flat.shape[1], k), edit.right.reshape(-1, k, flat.shape[2])
    return LowRank(left, edit.values.reshape(-1, k), right, wide(flat.dtype, dtype))


@dataclass(frozen=True)
class _Result:
    """How a weight was rounded, with the figures of the pass that did it and the block they were made with."""

    mode: str
    iterations: int
    figures: Figures
    block: Tensor


def _fill(job: Pass, energy: Float64[Tensor, " batch"], mode: Mode, seed: int) -> _Result:
    """Round into `job.out`."""
    core, glimpse = job.edit.core, None
    if mode in ("auto", "compensated"):
        glimpse = _Glimpse.of(job, energy)
    if mode != "compensated" and not (glimpse and glimpse.retention < HOPELESS):
        block = job.start(core, seed)
        figures = job.write(core, torch.ones_like(energy, dtype=torch.bool), block)
        enough = (core * (job.edit.target - figures.residual)).sum() >= ENOUGH * energy.sum()
        if mode != "auto" or enough:
            return _Result("stochastic" if mode == "stochastic" else "nearest", 0, figures, block)
    return _compensate(job, energy, glimpse, seed)


def _compensate(
    job: Pass, energy: Float64[Tensor, " batch"], glimpse: "_Glimpse | None", seed: int
) -> _Result:
    """Round with a core found on a sample, if there is one; unless that will do, find it on all entries by looks."""
    every = torch.ones_like(energy, dtype=torch.bool)
    search, figures = _Search(job.edit.core, torch.ones_like(job.edit.core), job.edit.target), None
    if glimpse:
        search.run(glimpse.residual)
        search = search.anew()
        block = job.start(search.core, seed)
        figures = job.write(search.core, every, block)
        search.take(figures.residual, every)
    tried = search.iterations
    search.run(lambda core, active: job.edit.target - job.look(core, active))
    if figures is None or (search.iterations > tried).any():
        block = job.start(search.best_core, seed)
        figures = job.write(search.best_core, every, block)
    return _Result("compensated", int(search.iterations.max()), figures, block)


class _Glimpse:
    """The response of a few rows to a core, which stands for that of all."""

    def __init__(self, job: Pass, energy: Tensor, some: list[int], share: Tensor) -> None:
        self._job, self._some, self._share = job, some, share
        lost = self.residual(job.edit.core, energy > 0)
        self.retention = 1 - float((job.edit.core * lost).sum() / energy.sum())

    @classmethod
    def of(cls, job: Pass, energy: Float64[Tensor, " batch"]) -> "_Glimpse | None":
        """None where the matrices are small, or the edit so uneven over rows that a sample says little."""
        _, m, n = job.anchor.shape
        some = sample(job.anchor.shape, max(m * n // 16, SAMPLE))
        part = len(some) / len(list(tiles(job.anchor.shape)))
        if part > 0.3:
            return None
        share = job.edit.share(some)
        weights = torch.linalg.eigvalsh(share)[energy > 0]
        even = bool(((weights > part / UNEVEN) & (weights < UNEVEN * part)).all())
        return cls(job, energy, some, share) if even else None

    def residual(
        self, core: Float64[Tensor, "batch k k"], active: Bool[Tensor, " batch"]
    ) -> Float64[Tensor, "batch k k"]:
        """The intended core minus that of what would be stored, as these rows have it."""
        lost = self._share @ self._job.edit.within - self._job.look(core, active, self._some)
        one = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
        return torch.linalg.solve(_pick(active, self._share, one), lost)


class _Search:
    """Corrects the core of each matrix until what is stored has the intended one.

    A matrix that has arrived keeps its core, so that a batch gives what its matrices would alone; one that never
    arrives gets its best.
    """

    def __init__(self, core: Tensor, length: Tensor, target: Float64[Tensor, "batch k k"]) -> None:
        self.core = self.best_core = core
        self._target, self._energy = target, target.square().sum((-2, -1))
        self.length, self.iterations = length, torch.zeros_like(self._energy)
        # On the diagonal and off it, the core answers differently.
        one = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
        self._parts = torch.stack((one, 1 - one))
        self._answers = self._steps = core.new_zeros(len(core), 2)
        self._residual, self._measured = torch.full_like(core, torch.nan), False
        self._distance = self._least = torch.full_like(self._energy, torch.inf)
        self._setbacks = torch.zeros_like(self._energy)

    def anew(self) -> "_Search":
        """A search from the best core on, with the step lengths learnt and the iterations counted so far."""
        other = _Search(self.best_core, self.length, self._target)
        other.iterations = self.iterations
        return other

    def run(self, measure: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Correct until each matrix is within the tolerances, or no better core is to be had.

        `measure` gives the residual of a core, for the matrices asked for; that of the first may be known.
        """
        if not self._measured:
            every = torch.ones_like(self._energy, dtype=torch.bool)
            self.take(measure(self.core, every), every)
        while bool((active := self._active()).any()):
            step = self._residual * self.length * 0.5 ** self._setbacks[:, None, None]
            self.core = _pick(active, self.core + step, self.core)
            residual = _pick(active, measure(self.core, active), self._residual)
            self._learn(step, self._residual - residual, active)
            self.iterations = self.iterations + active
            self.take(residual, active)

    def _active(self) -> Bool[Tensor, " batch"]:
        # Without an edit the distance is no number or infinite; such a matrix stays as it is.
        able = (self._setbacks < PATIENCE) & (self.iterations < LIMIT) & (self._energy > 0)
        return able & (self._distance > 1)

    def _learn(self, step: Tensor, answer: Tensor, active: Tensor) -> None:
        """Make the next step as long, in residuals, as the answers to steps so far call for, the last ones first."""
        answers, steps = (
            torch.einsum("ekl,ekl,pkl->ep", step, other, self._parts) for other in (answer, step)
        )
        self._answers, self._steps = answers + 0.1 * self._answers, steps + 0.1 * self._steps
        diagonal, beside = (self._answers / self._steps)[:, :, None, None].unbind(1)
        gain = torch.where(self._parts[0] > 0, diagonal, beside)
        wanted = torch.where(gain > 0, 1 / gain, 2 * self.length).clamp(0.4, 4)
        self.length = _pick(active, torch.minimum(wanted, 2 * self.length), self.length)

    def take(self, residual: Tensor, active: Tensor) -> None:
        """Note the residual of the core, for the matrices asked for."""
        self._residual, self._measured = residual, True
        beside = torch.linalg.matrix_norm(residual) / (CORE_TOLERANCE * self._energy.sqrt())
        lost = (self._target * residual).sum((-2, -1)).abs() / (TOLERANCE * self._energy)
        self._distance = torch.maximum(beside, lost)
        better = active & (self._distance < self._least)
        self._least = torch.where(better, self._distance, self._least)
        # What is stored may answer a change of the core twice over: shorter steps end the swinging.
        self._setbacks = self._setbacks + (active & ~better)
        self.best_core = _pick(better, self.core, self.best_core)


def _pick(where: Bool[Tensor, " batch"], one: Tensor, other: Tensor) -> Tensor:
    return torch.where(where[:, None, None], one, other)


def _refuse_overflow(job: Pass, name: str) -> None:
    """Raise InputError for the anchor or the result, whichever holds infinity or NaN."""
    if not torch.stack(torch.aminmax(job.anchor)).isfinite().all():
        raise InputError(
            f"{name}: the weight holds infinity or NaN; needed finite values. Check the file it came from."
        )
    if torch.stack(torch.aminmax(job.out)).isfinite().all():
        return
    raise InputError(
        f"{name}: the edited weight does not fit {_label(job.out.dtype)} (largest value "
        f"{torch.finfo(job.out.dtype).max:g}). Store a wider range: --dtype bfloat16, or keep the source's dtype "
        "with --dtype keep; or lower --alpha."
    )


def _unchanged(job: Pass, shape: torch.Size, name: str) -> Stored:
    energy = job.cast()
    if not math.isfinite(energy):
        _refuse_overflow(job, name)
    return Stored(job.out.view(shape), "nearest", 1.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0, energy, 0)


def _judge(
    job: Pass, shape: torch.Size, energy: Float64[Tensor, " batch"], result: _Result, seed: int
) -> Stored:
    figures = result.figures
    largest = job.largest(result.block, figures)
    edit_energy, noise_energy = float(energy.sum()), float(figures.noise.sum())
    inner = float((job.edit.core * (job.edit.target - figures.residual)).sum())
    return Stored(
        weight=job.out.view(shape),
        mode=result.mode,
        retention=inner / edit_energy,
        noise=(noise_energy / edit_energy) ** 0.5,
        noise_spectral=float((largest / job.edit.spectral(seed)).nan_to_num(0.0).max()),
        iterations=result.iterations,
        inner=inner,
        edit_energy=edit_energy,
        noise_energy=noise_energy,
        anchor_energy=float(figures.anchor.sum()),
        changed=int(figures.changed.sum()),
    )
