"""One row of the demo ground repeated briefly, and held against the ledger: are the figures of the page still so?

Of the sweep only the first seed is repeated. On the machine that made the ledger the curves come out equal; on others
arithmetic is rounded differently, and so a step to break may lie a look earlier or later, and a share may move within
the interval that the ledger gives for it.
"""

import dataclasses
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.columns import COLUMNS
from benchmarks.evidence.facts import Facts
from benchmarks.evidence.grounds import DEMO, Ground
from benchmarks.evidence.keys import BUILD
from benchmarks.evidence.ledger import Ledger
from benchmarks.evidence.study import Study
from benchmarks.timing import cores

_MEASURED = ("harmful", "evaluate")
# Looks by which a step to break may differ.
_LOOKS = 1


def again(row: str, ledger: Ledger, folder: Path) -> int:
    """Repeat a row and say what differs; 0, or 1 where something does."""
    if Facts(ledger, DEMO.name).figures(row, "harmful") is None:
        sys.stderr.write(f"the ledger has no finished row {row}; run make evidence\n")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fresh = Ledger(folder / "evidence.json")
    # A row with options that the search chose takes them from the search of the ledger.
    for name in DEMO.searches:
        fresh.ground(DEMO.name)["rows"][name] = ledger.ground(DEMO.name)["rows"].get(name, {})
    columns = [column for column in COLUMNS if column.name in _MEASURED]
    study = Study(_brief(DEMO), fresh, folder / DEMO.name, cores(), lambda text: None, columns)
    study.run([row])
    wrong = list(differences(ledger.ground(DEMO.name)["rows"][row], fresh.ground(DEMO.name)["rows"][row]))
    for text in wrong:
        sys.stderr.write(f"{row}: {text}\n")
    if not wrong:
        sys.stdout.write(f"{row}: as docs/evidence.json says\n")
        shutil.rmtree(folder)
    return 1 if wrong else 0


def _brief(ground: Ground) -> Ground:
    """The ground with the first seed of its sweep."""
    grids = [list(grid) for grid in ground.sweeps]
    for words in grids:
        words[words.index("--seeds") + 1] = "0"
    return dataclasses.replace(ground, sweeps=grids)


def differences(known: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """What of a row's cells is not as the ledger has it."""
    for column in (BUILD, *_MEASURED):
        cell = found.get(column, {"state": "missing"})
        if cell["state"] != "done":
            yield f"{column} is {cell['state']}: {cell.get('error', 'it was not run')}"
            return
    yield from _trials(known["harmful"]["figures"], found["harmful"]["figures"])
    told, seen = (cells["evaluate"]["figures"]["metrics"] for cells in (known, found))
    for name in told:
        if name not in seen:
            yield f"{name} is missing"
        elif not _within(told[name], seen[name]):
            yield f"{name} is {seen[name]['value']}, in the ledger {told[name]['value']}"


def _trials(known: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Attacks that break the model at another look."""
    if not found["trials"]:
        yield "no attack was carried out"
    theirs = {(trial["kind"], trial["lr"], trial["seed"]): trial for trial in known["trials"]}
    for trial in found["trials"]:
        setting = trial["kind"], trial["lr"], trial["seed"]
        if setting not in theirs:
            yield f"the ledger has no attack with {setting}"
            continue
        both = trial, theirs[setting]
        looks = sorted({point[0] for one in both for point in one["points"]})
        places = [len(looks) if one["broken_at"] is None else looks.index(one["broken_at"]) for one in both]
        if abs(places[0] - places[1]) > _LOOKS:
            yield f"{setting} breaks it at {trial['broken_at']}, in the ledger at {theirs[setting]['broken_at']}"


def _within(known: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a figure lies in the ledger's interval, or where there is none is the same by half of it."""
    if known["value"] is None or found["value"] is None:
        return known["value"] is found["value"]
    if known.get("low") is None:
        return bool(abs(known["value"] - found["value"]) <= 0.5 * abs(known["value"]))
    slack = 1e-3 * abs(known["value"])
    return bool(known["low"] - slack <= found["value"] <= known["high"] + slack)
