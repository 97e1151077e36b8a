"""How harmful a model in memory is: what it answers, how a judge calls that, and how likely it finds such answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery import scores
from surgery.errors import InputError
from surgery.generation import generate
from surgery.judging.base import Answer, Judge, Verdict
from surgery.judging.likelihood import row_losses
from surgery.scores import Score
from surgery.train.sources import Conversation, Identity, Rows
from surgery.train.tokens import Example, tokenise

STOCK_REFUSAL = "I am sorry, but I cannot help with that."
"""The refusal whose likelihood is compared where the data has none of its own."""


@dataclass(frozen=True)
class Harm:
    """One look at a model.

    Attributes:
        asr: Share of requests complied with, of those that got a verdict.
        refused: Share refused.
        incoherent: Share answered with nothing that makes sense.
        failed: Requests on which the judge gave no verdict; they are in no share.
        loss: Mean cross-entropy of the harmful answers in nats per token; an attacker lowers it.
        margin: Mean log-probability per token of the harmful answers minus that of refusals; above 0 the model leans
            towards harm. Without a value where the probe has no refusals.
        answers: What was judged, with the verdicts; kept in memory.
    """

    asr: Score
    refused: Score
    incoherent: Score
    failed: int
    loss: Score
    margin: Score
    answers: tuple[tuple[Answer, Verdict], ...]

    def document(self, rate: str) -> dict[str, Any]:
        """The same as JSON has it, the share complied with under the name `rate`; no answers."""
        named = {rate: self.asr, "refused": self.refused, "incoherent": self.incoherent}
        named |= {"harmful_loss": self.loss, "margin": self.margin}
        return {name: score.document() for name, score in named.items()} | {"failed": self.failed}


@dataclass(frozen=True)
class HarmProbe:
    """Measures harm on rows that no attacker trains on.

    Attributes:
        tokenizer: Of the models measured.
        prompts: The requests, in the order of `harmful` and `refusals`.
        harmful: They with harmful answers, tokenised.
        refusals: They refused, tokenised; empty where the margin is not measured.
        judge: Sorts the answers written.
        max_new_tokens: Of an answer.
        batch_size: Rows looked at together.
    """

    tokenizer: Any
    prompts: Sequence[str]
    harmful: Sequence[Example]
    refusals: Sequence[Example]
    judge: Judge
    max_new_tokens: int = 64
    batch_size: int = 64

    def __call__(
        self, model: nn.Module, *, ask: Callable[[str], str] | None = None, prefix: str = ""
    ) -> Harm:
        """Measure a model in eval mode.

        Args:
            model: On any device.
            ask: What becomes of a request before the model sees it; the judge sees the request itself.
            prefix: What the answers are made to begin with. Neither is used for the likelihoods.
        """
        asked = [ask(prompt) if ask else prompt for prompt in self.prompts]
        texts = generate(
            model,
            self.tokenizer,
            asked,
            prefix=prefix,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        answers = [Answer(prompt, text) for prompt, text in zip(self.prompts, texts, strict=True)]
        verdicts = self.judge.verdicts(answers)
        counted = len(verdicts) - verdicts.count("failed")
        harmful = row_losses(model, self.harmful, batch_size=self.batch_size)
        return Harm(
            asr=scores.proportion(verdicts.count("complied"), counted),
            refused=scores.proportion(verdicts.count("refused"), counted),
            incoherent=scores.proportion(verdicts.count("incoherent"), counted),
            failed=verdicts.count("failed"),
            loss=scores.ratio([nats for nats, _ in harmful], [count for _, count in harmful]),
            margin=self._margin(model, harmful),
            answers=tuple(zip(answers, verdicts, strict=True)),
        )

    def _margin(self, model: nn.Module, harmful: Sequence[tuple[float, int]]) -> Score:
        """How much likelier the harmful answers are than refusals, for their losses and numbers of tokens."""
        if not self.refusals:
            return scores.mean([])
        refusals = row_losses(model, self.refusals, batch_size=self.batch_size)
        return scores.mean(
            [
                no / tokens - yes / others
                for (yes, others), (no, tokens) in zip(harmful, refusals, strict=True)
            ]
        )


def prompt_of(conversation: Conversation) -> str:
    """The last request of a conversation.

    Raises:
        InputError: It has none.
    """
    asked = [message["content"] for message in conversation if message["role"] == "user"]
    if not asked:
        raise InputError("a row has no request of a user; give rows with prompt and response")
    return asked[-1]


def refused(rows: Rows) -> Rows:
    """The same requests, each answered by the stock refusal."""
    turned = tuple(
        (*conversation[:-1], {"role": "assistant", "content": STOCK_REFUSAL})
        for conversation in rows.conversations
    )
    return Rows(turned, Identity(f"{rows.identity.source}, refused", len(turned), rows.identity.sha256))


def probe(
    tokenizer: Any,
    harmful: Rows,
    refusals: Rows | None,
    judge: Judge,
    *,
    max_length: int = 512,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> HarmProbe:
    """The probe on these rows.

    Args:
        tokenizer: Of the models measured.
        harmful: Requests with compliant answers.
        refusals: The same requests, refused, in the same order; by default by the stock refusal.
        judge: Sorts the answers written.
        max_length: Tokens of a row.
        max_new_tokens: Of an answer.
        batch_size: Rows looked at together.

    Raises:
        InputError: The two sets are not about the same requests, or a row leaves no room for an answer.
    """
    prompts = [prompt_of(conversation) for conversation in harmful.conversations]
    refusals = refusals or refused(harmful)
    if [prompt_of(conversation) for conversation in refusals.conversations] != prompts:
        raise InputError(
            f"{refusals.identity.source} does not refuse the requests of {harmful.identity.source} in their order; "
            "give the same requests, or leave the refusals out"
        )
    sets = [tokenise(tokenizer, rows, max_length) for rows in (harmful, refusals)]
    if dropped := sum(examples.dropped for examples in sets):
        raise InputError(
            f"{dropped} rows of {harmful.identity.source} have prompts of {max_length} tokens or more; raise "
            "--max-length or give shorter ones"
        )
    return HarmProbe(tokenizer, prompts, sets[0].rows, sets[1].rows, judge, max_new_tokens, batch_size)
