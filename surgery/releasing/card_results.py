"""What an evaluation measured, as a section of the model card: every number is one of `report.json`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.card_text import plain
from surgery.errors import InputError
from surgery.evaluate.report import by_condition, spelt
from surgery.gating import results
from surgery.scores import LEVEL

_AGAIN = "make it again by surgery evaluate"
_PARTS = {"model": str, "judge": str, "rate": str, "suite": str, "budget": dict, "not_measured": list}
_BUDGET = ("attacks", "learning_rates", "kinds", "seeds", "steps", "batch_size", "search", "threshold")

_ASIDE = (
    "Numbers compare only under the same budget, data and judge. An attack that did not break the model within this "
    "budget may do so with more steps, other data or other settings, and attacks that are not named were not tried."
)


@dataclass(frozen=True)
class Report:
    """A report of `surgery evaluate` that has been looked through.

    Attributes:
        document: What it holds.
        failed: Trials of attacks on the model that came to nothing.
    """

    document: Mapping[str, Any]
    failed: int

    @property
    def tells_output(self) -> bool:
        """Whether it says which output was measured; older reports do not."""
        return "manifest_sha256" in self.document


def read(path: Path) -> Report:
    """A report, from its file or its folder.

    Raises:
        InputError: There is none, or it is another kind of file, or it contradicts itself.
    """
    path = path / "report.json" if path.is_dir() else path
    checked = results.read(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    odd = [name for name, kind in _PARTS.items() if not isinstance(document.get(name), kind)]
    if checked.kind != "surgery" or odd:
        lacking = f" ({odd[0]} is not there, or no {_PARTS[odd[0]].__name__})" if odd else ""
        raise InputError(f"{path} is no report of surgery evaluate{lacking}; give the folder that it wrote")
    reference = document.get("reference")
    if not (reference is None or (isinstance(reference, dict) and isinstance(reference.get("model"), str))):
        raise InputError(f"{path} has a reference without a name; {_AGAIN}")
    found = Report(document, max(checked.failed.values(), default=0))
    try:
        render(found)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path} has scores that cannot be shown ({error!r}); {_AGAIN}") from None
    return found


def render(report: Report) -> str:
    """The section: the worst case first, then how it was measured, then each condition, then what is missing."""
    found = report.document
    both = bool(found.get("reference_metrics"))
    tables = [_table(name, rows, both=both) for name, rows in by_condition(_whole(found)).items() if rows]
    parts = ["## Evaluation", *_worst(found), _ASIDE, _settings(found), *tables, _absent(report)]
    return "\n\n".join(parts)


def _whole(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The report with a place for the reference's scores."""
    return {"reference_metrics": None, **found}


def _worst(found: Mapping[str, Any]) -> Iterator[str]:
    """What the strongest attack came to, and when; said before anything else."""
    name = f"resistance.worst_case_{found['rate']}"
    if name not in found["metrics"]:
        yield "No attack was carried out: what an attacker can do to this model has not been measured."
        return
    yield f"**Worst case over all attacks ({plain(found['rate'])}): {_both(found, name)}.**"
    steps = "resistance.steps_to_break"
    if steps in found["metrics"]:
        yield f"Steps of training until the earliest of the attacks that train broke it: {_both(found, steps)}."


def _both(found: Mapping[str, Any], name: str) -> str:
    """A score of the model, and of its reference where there is one."""
    theirs = (found.get("reference_metrics") or {}).get(name)
    ours = f"this model {plain(spelt(found['metrics'][name]))}"
    return ours if theirs is None else f"{ours}, its reference {plain(spelt(theirs))}"


def _settings(found: Mapping[str, Any]) -> str:
    """Who judged, and what the attackers had."""
    reference = found.get("reference")
    rows = [
        ("model measured", _named(found)),
        ("reference, attacked alike", _named(reference) if reference else "none: nothing to compare with"),
        ("judge", plain(found["judge"])),
        ("requests judged", plain(found.get("n"))),
        ("suite", plain(found["suite"])),
        *(
            (name.replace("_", " "), plain(found["budget"][name]))
            for name in _BUDGET
            if name in found["budget"]
        ),
        *_data(found.get("data")),
        ("measured by", plain(f"surgery {found.get('version')}")),
    ]
    return _rows(("setting", "value"), rows)


def _named(part: Mapping[str, Any]) -> str:
    """A model's name, and its commit unless the name has it."""
    name, commit = str(part["model"]), part.get("commit")
    return plain(name if not commit or str(commit) in name else f"{name}@{commit}")


def _data(data: Any) -> list[tuple[str, str]]:
    """What was attacked with and measured on."""
    if not isinstance(data, dict):
        return []
    return [
        (f"data, {plain(name).replace('_', ' ')}", plain(f"{entry.get('source')}, {entry.get('rows')} rows"))
        for name, entry in data.items()
        if isinstance(entry, dict)
    ]


def _table(condition: str, rows: Sequence[tuple[str, str, str]], *, both: bool) -> str:
    """The scores of a condition, the worst cases first; a column for the reference where there is one."""
    ordered = sorted(rows, key=lambda row: not row[0].startswith("worst_case"))
    columns = 3 if both else 2
    shown = [[plain(cell) for cell in row[:columns]] for row in ordered]
    heads = ("measure", f"this model (n, {100 * LEVEL:.0f} % interval)", "its reference")[:columns]
    return f"### {condition.capitalize()}\n\n" + _rows(heads, shown)


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, of cells that cannot end one another."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def _absent(report: Report) -> str:
    """What was not measured, and what makes the rest less certain."""
    texts = [plain(text) for text in report.document["not_measured"]]
    if report.failed:
        texts.append(f"{report.failed} trials of attacks failed, and count nowhere")
    if not report.tells_output:
        texts.append("the report does not say by its hash which output it measured; its name for it is above")
    parts = [
        "### Not measured",
        "\n".join(f"* {text}" for text in texts),
        "Nothing is known beyond the tables above.",
    ]
    return "\n\n".join(part for part in parts if part)
