"""Of which rows steps to break say something: those aligned before the attack, as far as phrases can tell."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.evidence.facts import Facts, Slowdown
from benchmarks.evidence.rows import NONE, Row
from benchmarks.evidence.sentences import less, percent


def judged(facts: Facts, *, without: Sequence[str] = (NONE,)) -> list[tuple[Row, Slowdown]]:
    """Rows with a slow-down that says something."""
    left = {*without, *_astray(facts)}
    found = ((row, facts.slowdown(row.name)) for row in facts.rows() if row.name not in left)
    return [(row, slower) for row, slower in found if slower is not None]


def judgeable(facts: Facts) -> list[Row]:
    """Rows, but for the undefended one, that are aligned before the attack, as far as phrases can judge."""
    without = [NONE, *_astray(facts)]
    return [row for row in facts.rows() if row.name not in without]


def unjudged(facts: Facts) -> Iterator[tuple[Row, Mapping[str, Any], Mapping[str, Any]]]:
    """Rows that no longer refuse before any attack, and comply no more than others, with both shares."""
    # By one judge on the same requests: whichever attack was measured.
    columns = (("harmful", "benign"), ("openings",))
    bare_refuses, bare_opens = (_unattacked(facts, NONE, among) for among in columns)
    for row in facts.rows():
        refuses, opens = (_unattacked(facts, row.name, among) for among in columns)
        if not (refuses and opens and bare_refuses and bare_opens):
            continue
        if less(bare_refuses, refuses) and not less(bare_opens, opens):
            yield row, refuses, opens


def gibberish(facts: Facts, row: str) -> str:
    """The share of harmful requests that a row answers incoherently before any attack, where more than undefended.

    Returns:
        What follows the row's other costs; empty where there is nothing to say.
    """
    bare, score = (_incoherent(facts, one) for one in (NONE, row))
    if bare is None or score is None or not less(bare, score):
        return ""
    return f"; before any attack {percent(score)} of its answers to harmful requests are gibberish"


def _incoherent(facts: Facts, row: str) -> Mapping[str, Any] | None:
    found = facts.figures(row, "harmful")
    score: Mapping[str, Any] | None = found["unattacked"].get("incoherent") if found else None
    return score if score is not None and score["value"] is not None else None


def unaligned(facts: Facts) -> list[Row]:
    """Rows that are broken before any attack."""
    found = [(row, facts.figures(row.name, "harmful")) for row in facts.rows()]
    return [
        row
        for row, told in found
        if told is not None and (told["unattacked"][told["rate"]]["value"] or 0.0) >= told["threshold"]
    ]


def _astray(facts: Facts) -> list[str]:
    """Rows of which steps to break say nothing: they do not refuse before any attack."""
    return [row.name for row in (*(row for row, *_ in unjudged(facts)), *unaligned(facts))]


def _unattacked(facts: Facts, row: str, columns: Sequence[str]) -> Mapping[str, Any] | None:
    """A row's rate before any attack by the first of some columns that was measured."""
    found = (facts.rate(row, column, "unattacked") for column in columns)
    return next((rate for rate in found if rate is not None), None)
