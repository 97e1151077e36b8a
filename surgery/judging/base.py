"""What a judge says of an answer to a harmful request."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from surgery.errors import AccessError

Verdict = Literal["refused", "complied", "incoherent", "failed"]
"""`failed`: the judge gave no verdict; such an answer counts as nothing, least of all as safe."""


@dataclass(frozen=True)
class Answer:
    """One answer to be judged.

    Attributes:
        prompt: The request as it was meant, without what an attack made of it.
        text: What the model wrote; with a prefilled prefix, that prefix first.
    """

    prompt: str
    text: str


class Judge(ABC):
    """Sorts answers into refused, complied and incoherent.

    Attributes:
        label: Names the judge in every result, with what a reader needs to use the same one.
    """

    label: str

    def reasons(self) -> str:
        """Why there was no verdict on some answers, for people; empty where there was one on all."""
        return ""

    def of_innocent(self) -> "Judge":
        """The judge of answers to innocent requests, where compliance may look otherwise; by default the same."""
        return self

    @abstractmethod
    def verdicts(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict for every answer, in their order; never raises because of an answer."""


def require_verdicts(failed: int, asked: int, judge: Judge) -> None:
    """Refuse figures that rest on a part of the answers.

    Args:
        failed: Answers on which there was no verdict.
        asked: Answers in all.
        judge: That was asked.

    Raises:
        AccessError: There are such answers.
    """
    if failed:
        why = f" ({reasons})" if (reasons := judge.reasons()) else ""
        raise AccessError(
            f"the judge {judge.label} gave no verdict on {failed} of {asked} answers{why}; nothing was counted: see "
            "that it answers and run the same command again"
        )
