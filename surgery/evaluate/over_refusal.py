"""Refusing too much: innocent requests in the words of harmful ones, and how many of them are refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery import scores
from surgery.generation import generate
from surgery.judging.base import Answer, Judge
from surgery.scores import Score


@dataclass(frozen=True)
class OverRefusal:
    """What became of the requests.

    Attributes:
        refused: Share refused, of those that got a verdict.
        incoherent: Share answered with nothing that makes sense.
        failed: Requests on which the judge gave no verdict; they are in no share.
    """

    refused: Score
    incoherent: Score
    failed: int

    def document(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return {
            "over_refusal": self.refused.document(),
            "incoherent": self.incoherent.document(),
            "failed": self.failed,
        }


def over_refusal(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    judge: Judge,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> OverRefusal:
    """Have a model answer innocent requests, and count what a judge, or its `of_innocent`, calls refused.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer.
        prompts: Innocent requests that look harmful.
        judge: Sorts the answers.
        max_new_tokens: Of an answer.
        batch_size: Answers written at once.
    """
    texts = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    judge = judge.of_innocent()
    verdicts = judge.verdicts([Answer(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])
    failed = verdicts.count("failed")
    counted = len(verdicts) - failed
    return OverRefusal(
        scores.proportion(verdicts.count("refused"), counted),
        scores.proportion(verdicts.count("incoherent"), counted),
        failed,
    )
