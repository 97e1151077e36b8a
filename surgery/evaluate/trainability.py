"""How much longer a model takes to learn something innocent than its reference does.

The loss to reach is where the reference has made four fifths of its own way: from its loss before the first step to
that after the last. A target at the end of the way would be met by chance there, and a model a little slower than its
reference would not meet it at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery import scores
from surgery.errors import InputError
from surgery.evaluate.learning import Curve
from surgery.scores import Censored, Score

SHARE = 0.8
"""Of the reference's way, from its first loss to its last."""


@dataclass(frozen=True)
class Trainability:
    """Learning of a model against that of its reference, a curve each for every seed.

    Attributes:
        model: Curves of the model.
        reference: Curves of the reference, in the order of the same seeds.
        targets: The loss to reach, by seed.
    """

    model: tuple[Curve, ...]
    reference: tuple[Curve, ...]
    targets: tuple[float, ...]

    def steps(self) -> tuple[Censored, ...]:
        """Of the model, by seed."""
        return tuple(curve.steps_to(goal) for curve, goal in zip(self.model, self.targets, strict=True))

    def reference_steps(self) -> tuple[Censored, ...]:
        """Of the reference, by seed."""
        return tuple(curve.steps_to(goal) for curve, goal in zip(self.reference, self.targets, strict=True))

    def steps_ratio(self) -> Score | Censored:
        """Steps of the model over those of the reference; above 1 the model learns more slowly.

        Where a run of the model did not get there, what is known is that the ratio is larger than with the steps
        taken. It has no value where a run of the reference did not get there, or a run of either was there before
        the first step: nothing was learnt on the way, and a ratio of 0 would say that all of it was.
        """
        theirs = [run.value for run in self.reference_steps()]
        if None in theirs or 0 in (*theirs, *(run.value for run in self.steps())):
            return Score(None, len(theirs), None, None, "none")
        below = [value for value in theirs if value is not None]
        ours = [run.censored_at if run.value is None else run.value for run in self.steps()]
        above = [value for value in ours if value is not None]
        if any(run.value is None for run in self.steps()):
            return Censored(None, math.fsum(above) / math.fsum(below), len(above))
        return scores.ratio(above, below)

    def document(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return {
            "targets": list(self.targets),
            "steps": [run.document() for run in self.steps()],
            "reference_steps": [run.document() for run in self.reference_steps()],
            "steps_ratio": self.steps_ratio().document(),
        }


def mean_steps(runs: Sequence[Censored]) -> Score | Censored:
    """The mean over seeds; where one did not get there, that the mean is larger than with the steps taken."""
    taken = [run.censored_at if run.value is None else run.value for run in runs]
    known = [value for value in taken if value is not None]
    if any(run.value is None for run in runs):
        return Censored(None, math.fsum(known) / len(known), len(known))
    return scores.mean(known)


def compare(model: Sequence[Curve], reference: Sequence[Curve], target: float | None = None) -> Trainability:
    """The curves of a model beside those of its reference.

    Args:
        model: A curve for each seed.
        reference: The same for the reference, in the order of the same seeds.
        target: The loss to reach; by default, for each seed, after `SHARE` of the reference's way.

    Raises:
        InputError: There are not as many curves of the one as of the other.
    """
    if not model or len(model) != len(reference):
        raise InputError(
            f"{len(model)} curves of the model and {len(reference)} of the reference; as many of each, and one or "
            "more, are needed: learn with the same seeds"
        )
    goals = [target if target is not None else _most_of_the_way(curve) for curve in reference]
    return Trainability(tuple(model), tuple(reference), tuple(goals))


def _most_of_the_way(curve: Curve) -> float:
    first, last = curve.looks[0].loss.value or 0.0, curve.final.value or 0.0
    return first - SHARE * (first - last)
