"""Direct preference optimisation: make one answer likelier than another, relative to what a reference says.

    L = -log sigmoid( beta [ (log p(chosen) - log r(chosen)) - (log p(rejected) - log r(rejected)) ] )

with r the reference. Rafailov, Sharma, Mitchell, Ermon, Manning, Finn: "Direct Preference Optimization: Your Language
Model is Secretly a Reward Model", NeurIPS 2023, https://arxiv.org/abs/2305.18290 (equation 7).
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

from surgery.errors import InputError
from surgery.train.losses import answer_logits
from surgery.train.step import Batch


def log_likelihoods(model: nn.Module, batch: Batch) -> Float[Tensor, " rows"]:
    """The logarithm of the probability of every row's answer given its prompt, in nats."""
    logits, targets, chosen = answer_logits(model, batch)
    each = cross_entropy(logits, targets, reduction="none")
    summed = each.new_zeros(len(batch.tokens)).index_add(0, chosen.nonzero()[:, 0], each)
    return -summed


def preference_losses(
    chosen: Float[Tensor, " rows"],
    rejected: Float[Tensor, " rows"],
    reference_chosen: Float[Tensor, " rows"],
    reference_rejected: Float[Tensor, " rows"],
    beta: float,
) -> Float[Tensor, " rows"]:
    """L of every pair, from log-likelihoods under the model and under the reference."""
    return -logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))


def pairs(
    preferred: Sequence[Any], dispreferred: Sequence[Any], otherwise: str = ""
) -> tuple[list[Any], list[Any]]:
    """Tokenised rows of either set that answer the same prompt, place by place, in the order of the second.

    Args:
        preferred: Aligned rows.
        dispreferred: Harmful rows.
        otherwise: What else can be done where no prompt is in both, for the message.

    Raises:
        InputError: No prompt is in both.
    """
    answers = {example.tokens[: example.prompt]: example for example in preferred}
    both = [example for example in dispreferred if example.tokens[: example.prompt] in answers]
    if not both:
        raise InputError(
            "no prompt of the harmful rows is among the aligned rows; both answers to one prompt are needed: "
            f"add refusals of the harmful prompts to --aligned-data{otherwise}"
        )
    return [answers[example.tokens[: example.prompt]] for example in both], both
