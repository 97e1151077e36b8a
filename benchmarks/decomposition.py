"""The truncated decomposition of one matrix, against the full one and against the usual randomised one."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.pairs import update
from benchmarks.timing import Measured, Row, alternated, cores, median, spread, timed
from surgery.spectral import Spectrum, truncated_svd

RANK = 6


def true_error(found: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error of a rank-k term."""
    return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))


def rows(repeats: int, sides: tuple[int, int] = (4096, 4096)) -> list[Row]:
    """Ratios for a matrix of each kind, with the true errors of both ways."""
    torch.set_num_threads(cores())
    found = []
    for kind in ("spiked", "bulk", "noise"):
        found += _kind(kind, sides, repeats)
    return found


def _kind(kind: str, sides: tuple[int, int], repeats: int) -> list[Row]:
    delta = update(kind, *sides, torch.Generator().manual_seed(1))
    results: dict[str, object] = {}

    def kept(name: str, call: Callable[[], object]) -> Callable[[], Measured]:
        def once() -> Measured:
            return timed(lambda: results.__setitem__(name, call()))

        return once

    ways = {
        "certified": kept("certified", lambda: truncated_svd(delta, RANK, seed=0, name="bench")),
        "lowrank": kept("lowrank", lambda: torch.svd_lowrank(delta, q=2 * RANK, niter=2)),
    }
    for way in ways.values():
        way()
    taken = alternated(ways, max(repeats, 5))
    taken |= alternated({"full": kept("full", lambda: torch.linalg.svd(delta, full_matrices=False))}, repeats)
    ours, theirs, full = (taken[name] for name in ("certified", "lowrank", "full"))
    left, values, right = results["full"]
    exact = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    spectrum = results["certified"]
    assert isinstance(spectrum, Spectrum)
    certificate = spectrum.certificates[0]
    u, s, v = results["lowrank"]
    errors = (
        f"true error {true_error(spectrum.factors.dense(), exact):.1e}, certified {certificate.error:.1e}, energy "
        f"deficit {certificate.energy_deficit:.1e} by {certificate.criterion} in {certificate.passes} passes; "
        f"svd_lowrank's true error {true_error((u[:, :RANK] * s[:RANK]) @ v[:, :RANK].T, exact):.1e}"
    )
    label = f"{sides[0]} x {sides[1]}, {kind}"
    against_full, against_lowrank = median(full) / median(ours), median(ours) / median(theirs)
    spiked = kind == "spiked"
    return [
        Row(
            f"{label}: full SVD / certified",
            against_full,
            "x",
            "at least 50, aim 100" if spiked else "",
            against_full >= 50 if spiked else None,
            f"{spread(full)} against {spread(ours)}",
        ),
        Row(
            f"{label}: certified / svd_lowrank",
            against_lowrank,
            "x",
            "at most 2" if kind != "noise" else "",
            against_lowrank <= 2 if kind != "noise" else None,
            f"{spread(theirs)}; {errors}",
        ),
    ]
