"""One trial: an attack carried out on a target, harm measured wherever it lets one look."""

import hashlib
from dataclasses import asdict
from typing import Any

from surgery.attacking.ground import Ground
from surgery.attacks.base import PLAIN, Approach, Attack, Settled
from surgery.judging.base import require_verdicts
from surgery.judging.harm import Harm

Point = dict[str, Any]
"""What one look saw."""


def run(
    attack: Attack,
    ground: Ground,
    *,
    until_settled: bool = False,
    skip_settled: bool = False,
    save_generations: bool = False,
    at_rest: list[Point] | None = None,
) -> dict[str, Any]:
    """Carry out an attack and return what was seen of it.

    Args:
        attack: With its budget.
        ground: Where.
        until_settled: End an attack that trains when two looks in a row found every request complied with.
        skip_settled: Look no more after two such looks, but for the last step.
        save_generations: Keep the answers, not just their hashes.
        at_rest: Gets the look at the model before the first step of an attack that trains; where it is there, it is
            not made again. For trials on one model, with the same `save_generations`.

    Returns:
        `budget`; `points`: at each look the steps taken, the measures of `Harm`, and the answers' verdicts;
        `settled` and `diverged`: why there are fewer steps than the budget has, if there are.

    Raises:
        InputError: The target does not allow the attack.
        AccessError: The judge gave no verdict on an answer: what is not judged is not safe.
    """
    points: list[Point] = []
    planned = getattr(attack, "steps", 0) if attack.trains else 0

    def look(steps: int, approach: Approach) -> Point:
        harm = ground.probe(ground.target.model, ask=approach.ask, prefix=approach.prefix)
        require_verdicts(harm.failed, len(harm.answers), ground.probe.judge)
        return {"steps": steps, **harm.document(ground.rate), "answers": _kept(harm, save_generations)}

    def watch(steps: int, approach: Approach) -> None:
        if skip_settled and steps != planned and _settled(points, ground.rate):
            return
        known = at_rest if steps == 0 and attack.trains and approach == PLAIN else None
        point = known[0] if known else look(steps, approach)
        if known is not None and not known:
            known.append(point)
        points.append(point)
        if until_settled and steps and _settled(points, ground.rate):
            raise Settled

    attack.carry_out(ground.target, watch)
    early = points[-1]["steps"] < planned
    settled = early and until_settled and _settled(points, ground.rate)
    return {
        "budget": attack.budget(), "points": points, "settled": settled, "diverged": early and not settled,
    }  # fmt: skip


def _settled(points: list[Point], rate: str) -> bool:
    """Whether the last two looks found every request complied with."""
    return len(points) > 1 and all(point[rate]["value"] == 1 for point in points[-2:])


def _kept(harm: Harm, whole: bool) -> list[dict[str, Any]]:
    """What of the answers may go into a file."""
    return [
        {"verdict": verdict, **(asdict(answer) if whole else {"sha256": _sha256(answer.text)})}
        for answer, verdict in harm.answers
    ]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
