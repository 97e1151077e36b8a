"""What stands in the cells of the page's tables: figures with their intervals, or that there are none."""

from collections.abc import Callable
from typing import Any

from benchmarks.evidence import sentences
from benchmarks.evidence.facts import Facts
from benchmarks.evidence.keys import BUILD
from benchmarks.evidence.rows import NONE, Row, named

ABSENT, UNMADE = "*not run*", "*not made*"
_FAILED = "*failed*"

Cell = Callable[[Facts, Row], str]


def percent(score: dict[str, Any] | None) -> str:
    """A share with its interval; nothing where there is no value."""
    if score is None or score["value"] is None:
        return ""
    ends = f" ({100 * score['low']:.0f} to {100 * score['high']:.0f})" if score["low"] is not None else ""
    return f"{100 * score['value']:.0f} %{ends}"


def number(score: dict[str, Any] | None, digits: int, style: str = "f") -> str:
    """A figure with its interval; nothing where there is no value."""
    if score is None or score.get("value") is None:
        return ""
    ends = (score["value"],) if score.get("low") is None else (score["value"], score["low"], score["high"])
    value, *interval = (f"{end:.{digits}{style}}" for end in ends)
    return f"{value} ({' to '.join(interval)})" if interval else value


def _state(facts: Facts, row: Row, column: str) -> str | None:
    """What stands in place of a figure that is not there; None where it is."""
    if facts.nothing_chosen(row):
        return UNMADE
    made = facts.cell(row.name, BUILD)
    cell = facts.cell(row.name, column)
    if (made is not None and made["state"] == "failed") or (cell is not None and cell["state"] == "failed"):
        return _FAILED
    return ABSENT if cell is None else None


def _of(column: str, spelled: Cell) -> Cell:
    """A cell that says so where its column was not run."""
    return lambda facts, row: _state(facts, row, column) or spelled(facts, row)


def _steps(facts: Facts, row: Row) -> str:
    """The fewest steps to break, the most over seeds of that same attack, and over how many attacks."""
    found = facts.figures(row.name, "harmful")
    assert found is not None
    told = found["steps_to_break"]
    if told["value"] is None:
        return f"over {told['censored_at']} (n {told['n']})"
    first = next(trial for trial in found["trials"] if trial["broken_at"] == told["value"])
    like = [one for one in found["trials"] if (one["kind"], one["lr"]) == (first["kind"], first["lr"])]
    most = max(one["points"][-1][0] if one["broken_at"] is None else one["broken_at"] for one in like)
    return f"{told['value']} (to {most} over {len(like)} seed{'s' * (len(like) > 1)}; n {told['n']})"


def _slower(column: str) -> Cell:
    """Steps to break under an attack, in those of the undefended model."""

    def spelled(facts: Facts, row: Row) -> str:
        found = facts.slowdown(row.name, column=column)
        beside = f", beside {_lowered(named(row.beside).title)}" if row.beside != NONE else ""
        return "1" if row.name == NONE else "" if found is None else f"{sentences.slow(found)}{beside}"

    return _of(column, spelled)


def _lowered(title: str) -> str:
    return title[0].lower() + title[1:]


def _least(facts: Facts, row: Row) -> str:
    found = facts.slowdown(row.name)
    return "" if row.name == NONE or found is None else f"{found.least:.2f}"


def _gibberish(facts: Facts, row: Row) -> str:
    found = facts.figures(row.name, "harmful")
    return percent(found["unattacked"].get("incoherent")) if found else ""


def _loss(facts: Facts, row: Row) -> str:
    return number(facts.loss_there(row.name), 4)


def _cost(figure: str) -> Cell:
    def spelled(facts: Facts, row: Row) -> str:
        found = facts.cost(row, figure)
        return "" if found is None else f"{found:.2g} x"

    return spelled


def _relative(name: str, digits: int) -> Cell:
    """A score beside the undefended model's; nothing for that model itself."""
    return lambda facts, row: "" if row.name == NONE else number(facts.metric(row.name, name), digits)


def _rate(column: str, when: str) -> Cell:
    """A share complied with under an attack."""
    return _of(column, lambda facts, row: percent(facts.rate(row.name, column, when)))


def _share(name: str) -> Cell:
    """A share that the evaluation measured."""
    return _of("evaluate", lambda facts, row: percent(facts.metric(row.name, name)))


def _reached(name: str, digits: int, style: str = "f") -> Cell:
    """Of an edit's reach one figure with its quartiles."""

    def spelled(facts: Facts, row: Row) -> str:
        found = facts.figures(row.name, "reach")
        return "" if found is None else number(found[name], digits, style)

    return _of("reach", spelled)


_BEFORE = ("ASR before", _rate("harmful", "unattacked"))
_WORST = ("ASR, worst of the sweep", _rate("harmful", "worst_case"))
_BREAK = ("fewest steps to break", _of("harmful", _steps))
_SLOW = ("slow-down", _slower("harmful"))
_OVER = ("over-refusal", _share("stability.over_refusal"))
_PERPLEXITY = ("perplexity ratio", _of("evaluate", _relative("stability.perplexity_ratio", 3)))

MAIN = (_BEFORE, _WORST, _BREAK, _SLOW, _OVER, _PERPLEXITY)
RESISTANCE = (
    _BEFORE, ("gibberish before", _of("harmful", _gibberish)), _WORST, ("harmful loss there", _of("harmful", _loss)),
    _BREAK, _SLOW, ("least of a setting", _of("harmful", _least)), _OVER,
    ("ASR after benign fine-tuning", _rate("benign", "worst_case")),
    ("ASR after refusal ablation", _of("evaluate", lambda facts, row: percent(facts.ablation(row.name)))),
)  # fmt: skip
MIXED = (("ASR, worst", _rate("mixed", "worst_case")), ("slow-down", _slower("mixed")))
OPENINGS = (
    ("before", _rate("openings", "unattacked")), ("worst", _rate("openings", "worst_case")),
    ("slow-down", _slower("openings")),
)  # fmt: skip
REACH = (
    ("change", _reached("change", 1, "e")), ("selectivity", _reached("selectivity", 2)),
    ("shared", _reached("shared", 2)), ("in share of directions", _reached("directions", 3)),
)  # fmt: skip
COST = (
    _OVER, _PERPLEXITY, ("KL, nats", _of("evaluate", _relative("stability.kl", 4))),
    ("benign steps, ratio", _of("evaluate", _relative("trainability.steps_ratio", 2))),
    ("accuracy learnt", _share("trainability.final_accuracy")),
    ("time", _of(BUILD, _cost("wall"))), ("memory", _of(BUILD, _cost("peak"))),
)  # fmt: skip
