"""The plot of the study: how much each row slows harmful fine-tuning down, one panel for each pair."""

import io
from pathlib import Path
from typing import Any

from benchmarks.evidence.facts import Facts
from benchmarks.evidence.grounds import GROUNDS
from benchmarks.evidence.judging import judgeable
from benchmarks.evidence.ledger import Ledger, digest_of
from benchmarks.evidence.rows import NONE

FILE = Path(__file__).parents[2] / "docs" / "evidence.svg"


Point = tuple[str, float, float, float, bool]


def points(ledger: Ledger) -> dict[str, list[Point]]:
    """By ground, of each measured row that its judge can judge: title, slow-down, ends, whether it is a bound."""
    found: dict[str, list[Point]] = {}
    for name in GROUNDS:
        facts = Facts(ledger, name)
        slowed = [(row.title, facts.slowdown(row.name, NONE)) for row in judgeable(facts)]
        found[name] = [
            (title, one.value, one.low, one.high, one.unbroken > 0)
            for title, one in slowed
            if one is not None
        ]
    return found


def fits(ledger: Ledger) -> bool:
    """Whether the file was drawn from these points."""
    return FILE.is_file() and _mark(points(ledger)) in FILE.read_text()


def write(ledger: Ledger) -> None:
    """Draw `docs/evidence.svg`; the same points give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {name: rows for name, rows in points(ledger).items() if rows}
    with matplotlib.rc_context({"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9}):
        tallest = max((len(rows) for rows in found.values()), default=1)
        figure, axes = pyplot.subplots(
            1, max(1, len(found)), figsize=(7.4 * max(1, len(found)), 1.2 + 0.27 * tallest), squeeze=False
        )
        for panel, (name, rows) in zip(axes[0], found.items(), strict=False):
            _draw(panel, GROUNDS[name].title, rows)
        figure.tight_layout()
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Description": _mark(points(ledger))})
        pyplot.close(figure)
    FILE.write_text("\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n")


def _draw(panel: Any, title: str, rows: list[Point]) -> None:
    """One panel: a point and its interval for each row, against no defence at 1; an arrow where it is a bound."""
    places = range(len(rows), 0, -1)
    for place, (_, value, low, high, bound) in zip(places, rows, strict=True):
        panel.plot([low, high], [place, place], color="#4477aa", linewidth=1.5)
        panel.plot([value], [place], ">" if bound else "o", color="#4477aa", markersize=6 if bound else 4)
    panel.axvline(1, color="#888888", linewidth=0.8, linestyle="--")
    panel.axvline(3, color="#bbbbbb", linewidth=0.8, linestyle=":")
    panel.set_xscale("log")
    ends = [end for _, _, low, high, _ in rows for end in (low, high)]
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 3, 5, 10, 20) if min([0.7, *ends]) <= tick <= max([4, *ends])]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xticks([], minor=True)
    panel.set_yticks(list(places), [name for name, *_ in rows])
    panel.set_xlabel("steps to break, relative to no defence (95 %; arrow: at least)")
    panel.set_title(title, fontsize=9, loc="right")


def _mark(found: dict[str, list[Point]]) -> str:
    rounded = {
        name: [(title, *(f"{number:.4g}" for number in figures), bound) for title, *figures, bound in rows]
        for name, rows in found.items()
    }
    return f"evidence {digest_of(rounded)}"
