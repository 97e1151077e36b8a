"""Storing an edit in a dtype that is too coarse for it.

A weight W lies on the grid of its dtype; an edit E smaller than half a step is lost when W + E is rounded to nearest.
What was stored, D = round(W + E) - W, is judged by its retention <D, E> / ||E||^2 and its noise ||D - E|| / ||E||.

* nearest: round to nearest, ties to even.
* stochastic: up with probability equal to the fraction; unbiased, noisy; Philox bits keyed by seed and tensor name.
* compensated: round to nearest, but of W + U C V^T, where E = U S V^T and the k x k core C is chosen so that
  U^T D V = S. Fixed point C <- C + (S - U^T D V) from C = S. Deterministic; at small edits a half to a third of the
  noise of stochastic. An edit of full rank has no small core: there C is one number, the gain along E, chosen so
  that <D, E> = ||E||^2.
* auto: nearest where it retains at least `ENOUGH`, else compensated.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from surgery.errors import InputError, UsageError
from surgery.kernels import philox
from surgery.kernels.store import AbstractEdit, Dense, LowRank, Pass, nearest, norms, stochastic, tiles, wide
from surgery.spectral import Factors

Mode = Literal["auto", "nearest", "compensated", "stochastic"]

ENOUGH = 0.99
"""Retention from which `auto` is content with rounding to nearest."""

TOLERANCE = 1e-3
"""Compensation stops where ||S - U^T D V||_F is this small beside ||E||_F, in every matrix of a batch."""

LIMIT = 50
"""Iterations of compensation at most; the best core is kept. Edits of 1e-4 of the weight take about fifteen."""

PATIENCE = 4
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
    """||D - E||_2 / ||E||_2, the largest of a batch; estimated, some per cent too small at most (`store.norms`)."""
    iterations: int
    """Corrections of the core by compensation; 0 for other modes."""
    inner: float
    """<D, E>."""
    edit_energy: float
    """||E||_F^2."""
    noise_energy: float
    """||D - E||_F^2."""
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

    Raises:
        InputError: `anchor` or the result holds infinity or NaN, or the sum overflows `dtype`.
        UsageError: an unknown mode or dtype, or shapes that differ.
    """
    _check(anchor, edit, dtype, mode, name)
    flat = anchor.reshape(-1, *anchor.shape[-2:])
    job = Pass(flat, _edit(edit, flat, dtype), torch.empty_like(flat, dtype=dtype))
    energy = (job.edit.core * job.edit.target).sum((-2, -1))
    if not energy.any():
        return _unchanged(job, anchor.shape, name)
    words = philox.key(seed, name)
    used, found, iterations = _fill(job, energy, mode, words)
    _refuse_overflow(job, name)
    return _judge(job, anchor.shape, energy, found, used, iterations, words)


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


def _fill(
    job: Pass, energy: Float64[Tensor, " batch"], mode: Mode, words: tuple[int, int]
) -> tuple[str, Float64[Tensor, "batch k k"], int]:
    """Round into `job.out`; the mode used, the core of what is stored, and the iterations."""
    core, every = job.edit.core, torch.ones_like(energy, dtype=torch.bool)
    if mode == "stochastic":
        return mode, replace(job, rounder=stochastic(words)).write(core, every), 0
    found = job.write(core, every)
    if mode == "nearest" or (mode == "auto" and (core * found).sum() >= ENOUGH * energy.sum()):
        return "nearest", found, 0
    found, iterations = _compensate(job, found, energy)
    return "compensated", found, iterations


def _compensate(
    job: Pass, found: Float64[Tensor, "batch k k"], energy: Float64[Tensor, " batch"]
) -> tuple[Float64[Tensor, "batch k k"], int]:
    """Correct the core of each matrix until what is stored has the intended one; that core, and the iterations.

    `found` is the core after rounding to nearest. A matrix that has arrived keeps its core, so that a batch gives
    what its matrices would alone; one that never arrives gets its best.
    """
    core = best_core = job.edit.core
    best_found, least, setbacks = found, torch.full_like(energy, torch.inf), torch.zeros_like(energy)
    for iteration in range(LIMIT + 1):
        residual = job.edit.target - found
        error = torch.linalg.matrix_norm(residual) / energy.sqrt()
        better = error < least
        least, setbacks = torch.where(better, error, least), torch.where(better, setbacks, setbacks + 1)
        best_core, best_found = _pick(better, core, best_core), _pick(better, found, best_found)
        # Without an edit the error is no number or infinite; such a matrix stays as it is.
        active = (error > TOLERANCE) & (setbacks < PATIENCE) & (energy > 0)
        if iteration == LIMIT or not active.any():
            break
        # What is stored may answer a change of the core twice over: shorter steps end the swinging.
        core = _pick(active, core + residual * 0.5 ** setbacks[:, None, None], core)
        found = _pick(active, job.write(core, active), found)
    # Not `error > least`: after an overflow the error is no number.
    stale = ~(error <= least) & (energy > 0)
    if stale.any():
        job.write(best_core, stale)
    return best_found, iteration


def _pick(where: Bool[Tensor, " batch"], one: Tensor, other: Tensor) -> Tensor:
    return torch.where(where[:, None, None], one, other)


def _refuse_overflow(job: Pass, name: str) -> None:
    if torch.stack(torch.aminmax(job.out)).isfinite().all():
        return
    if not torch.stack(torch.aminmax(job.anchor)).isfinite().all():
        raise InputError(
            f"{name}: the weight holds infinity or NaN; needed finite values. Check the file it came from."
        )
    raise InputError(
        f"{name}: the edited weight does not fit {_label(job.out.dtype)} (largest value "
        f"{torch.finfo(job.out.dtype).max:g}). Store a wider range: --dtype bfloat16, or keep the source's dtype "
        "with --dtype keep; or lower --alpha."
    )


def _unchanged(job: Pass, shape: torch.Size, name: str) -> Stored:
    for at in tiles(job.anchor.shape):
        job.out[at] = nearest(job.anchor[at], job.out.dtype)
    _refuse_overflow(job, name)
    return Stored(job.out.view(shape), "nearest", 1.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0, 0)


def _judge(
    job: Pass,
    shape: torch.Size,
    energy: Float64[Tensor, " batch"],
    found: Float64[Tensor, "batch k k"],
    used: str,
    iterations: int,
    words: tuple[int, int],
) -> Stored:
    seed = words[0] | words[1] << 31
    noise_energy, largest = norms(job.noise(), job.anchor.shape, job.edit.dtype, seed, job.out.device)
    edit_energy, inner = float(energy.sum()), float((job.edit.core * found).sum())
    return Stored(
        weight=job.out.view(shape),
        mode=used,
        retention=inner / edit_energy,
        noise=(float(noise_energy.sum()) / edit_energy) ** 0.5,
        noise_spectral=float((largest / job.edit.spectral(seed)).nan_to_num(0.0).max()),
        iterations=iterations,
        inner=inner,
        edit_energy=edit_energy,
        noise_energy=float(noise_energy.sum()),
        changed=job.changed(),
    )
