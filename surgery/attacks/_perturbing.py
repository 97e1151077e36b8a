"""Attacks that learn vectors and no weights: they are put into the model while it runs, and gone when it does not.

    minimise over v   mean over answered tokens of -log p(token | what comes before it, v),   ||v|| <= bound

by AdamW without decay on the attacker's rows, each step followed by the projection on the bound where there is one.
Vectors are learnt in a unit of their own, the root mean square of what they replace or are added to, so that one
learning rate suits models of any scale.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_doc import Doc
from jaxtyping import Float
from torch import Tensor, nn

from surgery.attacks._needs import require
from surgery.attacks.base import PLAIN, Attack, Settled, Target, Watch
from surgery.errors import UsageError
from surgery.train.feed import Feed
from surgery.train.losses import answer_loss
from surgery.train.step import Batch, Stream
from surgery.train.tokens import Example, tokenise


@dataclass(frozen=True)
class Perturbation:
    """Vectors to learn, and how a model is run with them.

    Attributes:
        values: The vectors in units of `unit`; the only thing here that needs a gradient.
        unit: How long a coordinate of 1 is.
        applied: The model with these vectors in it, inside a with-block; what it computes has a gradient with respect
            to them.
        limit: The largest norm that a row of `values` may have.
    """

    values: Float[Tensor, "vectors hidden"]
    unit: Float[Tensor, "#vectors 1"]
    applied: Callable[[Tensor], AbstractContextManager[None]]
    limit: float = float("inf")

    def vectors(self) -> Float[Tensor, "vectors hidden"]:
        """The vectors as the model sees them."""
        return self.values * self.unit

    @torch.no_grad()
    def project(self) -> None:
        """Vectors longer than the limit become as long as it is; the others stay."""
        if self.limit < float("inf"):
            self.values.copy_(self.values.renorm(2, 0, self.limit))


@dataclass(frozen=True)
class Perturbing(Attack):
    """Vectors learnt on harmful rows, with everything the attacker may choose."""

    needs: ClassVar[tuple[str, ...]] = ("harmful",)
    trains: ClassVar[bool] = True
    outside: ClassVar[bool] = True

    # Not `lr`, which a campaign draws for weights: these vectors have a scale of their own.
    learning_rate: Annotated[
        float, Doc("Of AdamW, as a share of the scale of what is learnt; the same at all steps.")
    ] = 0.1
    seed: Annotated[int, Doc("Of the order of the rows and of what is drawn to start from.")] = 0
    steps: Annotated[int, Doc("Steps of the optimiser; 0 attacks nothing.")] = 60
    every: Annotated[int, Doc("Steps between two looks at the harm.")] = 20
    batch_size: Annotated[int, Doc("Rows of a step.")] = 16

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("every", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}"
                )
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"learning-rate is {self.learning_rate}; it must be a number above 0")

    @abstractmethod
    def perturbation(self, target: Target, rows: Sequence[Example]) -> Perturbation:
        """What is learnt, before the first step.

        Raises:
            UsageError: The model has no room for it.
        """

    def carry_out(self, target: Target, watch: Watch) -> None:
        """Look, learn, look at every stride; a loss that is no number any more ends the attack early."""
        require(target, self)
        rows = tokenise(target.tokenizer, target.data["harmful"], target.max_length).rows
        found = self.perturbation(target, rows)
        watch(0, PLAIN)
        optimiser = torch.optim.AdamW([found.values], lr=self.learning_rate, weight_decay=0.0)
        feed = Feed({"harmful": Stream(rows)}, self.batch_size, seed=self.seed, device=target.device)
        for done in range(1, self.steps + 1):
            [batch] = feed.step(done - 1)["harmful"]
            if not _descended(target.model, found, batch, optimiser):
                return
            if done % self.every == 0 or done == self.steps:
                try:
                    with found.applied(found.vectors().detach()):
                        watch(done, PLAIN)
                except Settled:
                    return


def _descended(model: nn.Module, found: Perturbation, batch: Batch, optimiser: torch.optim.Optimizer) -> bool:
    """One step towards likelier answers, back within the bound; False, and no step, where loss or gradient is NaN."""
    with found.applied(found.vectors()):
        loss = answer_loss(model, batch, count=int(batch.answered[:, 1:].sum()))
        [gradient] = torch.autograd.grad(loss, [found.values])
    if not bool(loss.isfinite() & gradient.isfinite().all()):
        return False
    found.values.grad = gradient
    optimiser.step()
    found.project()
    return True
