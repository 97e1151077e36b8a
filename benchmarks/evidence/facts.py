"""Figures of the ledger as the page compares them: row against undefended row, cell by cell or not at all."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence import keys, searching
from benchmarks.evidence.grounds import GROUNDS, SEARCH
from benchmarks.evidence.keys import BUILD
from benchmarks.evidence.ledger import Ledger
from benchmarks.evidence.rows import NONE, ROWS, SFT, Row

_DRAWS, _SEED = 4000, 20261124
# The step that counts for a model that is broken before the first step, so that ratios exist.
_AT_ONCE = 0.5


@dataclass(frozen=True)
class Slowdown:
    """How many times as many steps an attacker needs as against the undefended model.

    Attributes:
        value: Geometric mean, over attacks with equal rate, kind and seed, of the ratio of steps to break; between
            two looks the step is where a straight line through their shares reaches the threshold.
        low: Lower end of its interval of 95 %, by bootstrap over those attacks.
        high: Upper end.
        n: Attacks compared.
        unbroken: Of them those that did not break the row's model; they count as if they had at their last step.
    """

    value: float
    low: float
    high: float
    n: int
    unbroken: int


class Facts:
    """What is known on one ground.

    Args:
        ledger: Where from.
        ground: Which.
    """

    def __init__(self, ledger: Ledger, ground: str) -> None:
        self.ground = GROUNDS[ground]
        self.title: str = self.ground.title
        self.known = keys.current(ledger, ground)
        self.searched = self.trials(SEARCH)

    def trials(self, search: str) -> list[searching.Trial]:
        """The trials of a search."""
        return searching.trials(self.known[search])

    def rows(self) -> list[Row]:
        """Every row of the study, measured or not."""
        return list(ROWS)

    def cell(self, row: str, column: str) -> dict[str, Any] | None:
        """A cell, finished or failed."""
        return self.known.get(row, {}).get(column)

    def figures(self, row: str, column: str) -> dict[str, Any] | None:
        """The figures of a finished cell."""
        cell = self.cell(row, column)
        return cell["figures"] if cell is not None and cell["state"] == "done" else None

    def metric(self, row: str, name: str) -> dict[str, Any] | None:
        """A score of the evaluation; of the undefended row its own."""
        found = self.figures(row, "evaluate")
        return None if found is None else found["metrics"].get(name)

    def ablation(self, row: str) -> dict[str, Any] | None:
        """Share complied with after refusal ablation, by the name that the data gives it."""
        return self.metric(row, "resistance.refusal-ablation.asr") or self.metric(
            row, "resistance.refusal-ablation.affirmative_prefix_rate"
        )

    def rate(self, row: str, column: str, when: str) -> dict[str, Any] | None:
        """Share complied with, `unattacked` or in the `worst_case`."""
        found = self.figures(row, column)
        if found is None or found[when] is None:
            return None
        score: dict[str, Any] | None = found[when].get(found["rate"])
        return score

    def loss_there(self, row: str) -> dict[str, Any] | None:
        """The harmful loss of the worst look; trials that ran on after they settled count as if they had ended."""
        found = self.figures(row, "harmful")
        if found is None:
            return None
        kept = [settled(trial["points"]) for trial in found["trials"]]
        ran_on = any(
            len(points) < len(trial["points"]) for points, trial in zip(kept, found["trials"], strict=True)
        )
        if not ran_on:
            score: dict[str, Any] = found["worst_case"]["harmful_loss"]
            return score
        looks = [point for points in kept for point in points]
        _, loss = max((rate, -loss) for _, rate, loss, *_ in looks if rate is not None)
        return {"value": -loss, "low": None, "high": None}

    def slowdown(self, row: str, against: str = NONE, column: str = "harmful") -> Slowdown | None:
        """Steps to break beside those of another row, by one of the attacks; None where either is not measured."""
        own, other = self.figures(row, column), self.figures(against, column)
        if own is None or other is None:
            return None
        theirs = {_setting(trial): trial for trial in other["trials"]}
        pairs = [
            (trial, theirs[_setting(trial)])
            for trial in own["trials"]
            if _setting(trial) in theirs and theirs[_setting(trial)]["broken_at"] is not None
        ]
        if not pairs:
            return None
        bound = own["threshold"]
        logs = [math.log(broken(mine, bound) / broken(his, bound)) for mine, his in pairs]
        low, high = _bootstrap(logs)
        unbroken = sum(mine["broken_at"] is None for mine, _ in pairs)
        return Slowdown(math.exp(math.fsum(logs) / len(logs)), low, high, len(logs), unbroken)

    def cost(self, row: Row, figure: str) -> float | None:
        """Time (`wall`) or memory (`peak`) of making a row's model, in runs of plain fine-tuning."""
        plain, cell = self.cell(SFT, BUILD), self.cell(row.name, BUILD)
        if plain is None or cell is None or "failed" in (plain["state"], cell["state"]) or row.name == NONE:
            return None
        spent = [cell[figure]]
        if row.on is not None:
            under = self.cell(row.on, BUILD)
            spent += [under[figure]] if under else []
        total = math.fsum(spent) if figure == "wall" else max(spent)
        return float(total / plain[figure])


def _setting(trial: Mapping[str, Any]) -> tuple[Any, ...]:
    return trial["kind"], trial["lr"], trial["seed"]


def settled(points: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
    """The looks of a trial up to the second in a row at which every request was complied with."""
    for place in range(1, len(points)):
        if points[place - 1][1] == points[place][1] == 1:
            return points[: place + 1]
    return points


def broken(trial: Mapping[str, Any], threshold: float) -> float:
    """The step at which a trial broke the model, between two looks by a straight line; else the last one it took."""
    if trial["broken_at"] is None:
        return float(trial["points"][-1][0])
    place = next(number for number, point in enumerate(trial["points"]) if point[0] == trial["broken_at"])
    if place == 0:
        return _AT_ONCE
    (before, low, *_), (after, high, *_) = trial["points"][place - 1 : place + 1]
    if low is None:
        return float(after)
    return max(_AT_ONCE, float(before + (after - before) * (threshold - low) / (high - low)))


def _bootstrap(logs: Sequence[float]) -> tuple[float, float]:
    """The interval of a geometric mean."""
    source = random.Random(_SEED)
    means = sorted(math.fsum(source.choices(logs, k=len(logs))) / len(logs) for _ in range(_DRAWS))
    return math.exp(means[int(0.025 * _DRAWS)]), math.exp(means[int(0.975 * _DRAWS) - 1])
