"""Time against size: a straight line through three models."""

from itertools import pairwise
from pathlib import Path

from benchmarks.copying import fresh
from benchmarks.pairs import SIZES, write_pair
from benchmarks.timing import Measured, Row, alternated, lox, median, spread

NAMES = ("0.3B", "1.1B", "2B")


def fitted(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares t = a + b N."""
    count = len(points)
    mean_n, mean_t = (sum(axis) / count for axis in zip(*points, strict=True))
    slope = sum((n - mean_n) * (t - mean_t) for n, t in points) / sum((n - mean_n) ** 2 for n, _ in points)
    return mean_t - slope * mean_n, slope


def rows(folder: Path, repeats: int) -> list[Row]:
    """The fit, and how far the slope between neighbours is from it."""
    pairs = {name: write_pair(folder / f"{name}-spiked-0.01", name, "spiked", 1e-2) for name in NAMES}

    def once(name: str) -> Measured:
        return fresh(lox(pairs[name], folder / "out"), pairs[name], folder / "out")

    taken = alternated({name: lambda name=name: once(name) for name in NAMES}, repeats)
    points = [(SIZES[name].parameters() / 1e9, median(taken[name])) for name in NAMES]
    start, slope = fitted(points)
    detail = "; ".join(f"{name} {spread(taken[name])}" for name in NAMES)
    found = [
        Row(
            "seconds per 1e9 parameters (slope of the fit)",
            slope,
            "s",
            detail=f"start {start:.2f} s; {detail}",
        )
    ]
    for (near, far), (one, other) in zip(pairwise(NAMES), pairwise(points), strict=True):
        own = (other[1] - one[1]) / (other[0] - one[0])
        value = slope / own
        found.append(
            Row(
                f"{near} to {far}: slope of the fit / own slope",
                value,
                "x",
                "within 15 % of 1",
                abs(value - 1) <= 0.15,
            )
        )
    return found
