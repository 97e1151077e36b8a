"""Parts of the sentences that the page says of its figures, and when two shares are called different."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.evidence.facts import FEW, Facts, Slowdown

Claim = Callable[[Facts], str | None]
"""A function of one ground's facts: a sentence, or None where its condition or the cells it needs are not there."""


def listed(rows: Sequence[str]) -> str:
    """Names one after the other; they hold commas themselves."""
    return "; ".join(rows) if rows else "none"


def items(told: Sequence[str]) -> str:
    """What follows a colon, a line each."""
    return "".join(f"\n  * {one}" for one in told)


def less(score: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a share lies below another: the interval of their difference excludes 0.

    Newcombe's (1998, method 10), put together from the Wilson intervals of the two, 95 %.
    """
    apart: float = other["value"] - score["value"]
    return apart > math.hypot(other["value"] - other["low"], score["high"] - score["value"])


def percent(score: Mapping[str, Any]) -> str:
    """A share without its interval."""
    return f"{100 * score['value']:.0f} %"


def slow(found: Slowdown) -> str:
    """A slow-down with its interval, or its range where the attacks are of one or two settings."""
    value = f"{'> ' if found.unbroken else ''}{found.value:.2f}"
    if found.n == 1:
        return f"{value} (n 1)"
    if found.settings < FEW:
        return f"{value} (each {found.low:.2f} to {found.high:.2f}, n {found.n})"
    return f"{value} ({found.low:.2f} to {found.high:.2f}, n {found.n})"


def innocent(facts: Facts, row: str) -> str:
    """How far a row's innocent answers are from the undefended model's."""
    kl = facts.metric(row, "stability.kl")
    return "KL not measured" if kl is None else f"KL {kl['value']:.2g} nats"
