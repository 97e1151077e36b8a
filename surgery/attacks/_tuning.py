"""Attacks that fine-tune: the loop that everything here trains with, on an attacker's rows, looked at on the way.

An adapter is taken off again afterwards, and weights that were trained are put back from copies, bit by bit.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_doc import Doc
from torch import nn

from surgery.attacks._needs import require
from surgery.attacks.base import PLAIN, Approach, Attack, Settled, Target, Watch
from surgery.choices import require_choices
from surgery.errors import UsageError
from surgery.train import network, parking
from surgery.train.crew import Crew
from surgery.train.feed import Feed
from surgery.train.loop import Diverged, Run
from surgery.train.sft import SFT
from surgery.train.sources import Rows
from surgery.train.step import Stream
from surgery.train.tokens import tokenise
from surgery.train.training import Training

_OPTIMISERS = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
}


@dataclass(frozen=True)
class Tuning(Attack):
    """Fine-tuning on some rows, with everything the attacker may choose."""

    trains: ClassVar[bool] = True

    kind: Annotated[Literal["lora", "full"], Doc("What is trained: an adapter, or all weights.")] = "lora"
    lr: Annotated[float, Doc("Learning rate, reached after a tenth of the steps and kept.")] = 5e-4
    seed: Annotated[int, Doc("Of the order of the rows and the adapter's start.")] = 0
    steps: Annotated[int, Doc("Steps of the optimiser; 0 attacks nothing.")] = 100
    every: Annotated[int, Doc("Steps between two looks at the harm.")] = 10
    growth: Annotated[
        float,
        Doc(
            "Let the distance between looks grow: each comes at this multiple of the last one's step; 1: even."
        ),
    ] = 1.0
    batch_size: Annotated[int, Doc("Rows of a step.")] = 8
    rank: Annotated[int, Doc("Of the adapter; its alpha is twice that.")] = 8
    optimiser: Annotated[Literal["adamw", "sgd", "adagrad"], Doc("SGD has momentum 0.9.")] = "adamw"

    def __post_init__(self) -> None:
        require_choices(self)
        for name, least in (("steps", 0), ("every", 1), ("batch_size", 1), ("rank", 1)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}"
                )
        if not 0 < self.lr < float("inf"):
            raise UsageError(f"lr is {self.lr}; it must be a number above 0")
        require_growth(self.growth)

    @abstractmethod
    def rows(self, target: Target) -> Rows:
        """What is trained on."""

    def approach(self) -> Approach:
        """How the model is asked while it is attacked."""
        return PLAIN

    def carry_out(self, target: Target, watch: Watch) -> None:
        """Look, fine-tune, look at every stride; a loss that is no number any more ends the attack early."""
        require(target, self)
        watch(0, self.approach())
        if self.steps == 0:
            return
        due = looks(self.steps, self.every, self.growth)
        training = self._training(target)
        with _trainable(target, training, self.seed) as model, suppress(Diverged, Settled):
            self._run(target, model).fit(partial(self._look, target, watch, due))

    def _training(self, target: Target) -> Training:
        return Training(
            steps=self.steps,
            batch_size=self.batch_size,
            max_length=target.max_length,
            lr=self.lr,
            schedule="constant",
            lora_rank=self.rank,
            lora_alpha=2.0 * self.rank,
            full=self.kind == "full",
        )

    def _run(self, target: Target, model: nn.Module) -> Run:
        examples = tokenise(target.tokenizer, self.rows(target), target.max_length).rows
        stream = Stream(examples)
        feed = Feed({"aligned": stream}, self.batch_size, seed=self.seed, device=target.device)
        crew = Crew(target.device)
        optimiser: Any = _OPTIMISERS[self.optimiser]
        return Run(SFT(), model, feed, self._training(target), self.seed, crew, optimiser=optimiser)

    def _look(self, target: Target, watch: Watch, due: frozenset[int], done: int, *_: Any) -> None:
        """After a step: watch if a look is due, without dropout."""
        if done not in due:
            return
        target.model.eval()
        watch(done, self.approach())


def require_growth(growth: float) -> None:
    """Refuse looks that come ever closer.

    Raises:
        UsageError: The factor is below 1, or no finite number.
    """
    if not 1 <= growth < float("inf"):
        raise UsageError(
            f"growth is {growth}; it must be a number from 1, as 1.5 for looks ever further apart"
        )


def looks(steps: int, every: int, growth: float) -> frozenset[int]:
    """The steps after which harm is looked at, the last one always among them.

    From a look at step s the next is at s + max(every, floor((growth - 1) s)): with growth above 1 the step at which
    a model breaks is known to that factor, wherever it lies, for a number of looks that is logarithmic in the steps.
    """
    found = {steps}
    step = 0
    while (step := step + max(every, int(min((growth - 1) * step, steps)))) < steps:
        found.add(step)
    return frozenset(found)


@contextmanager
def _trainable(target: Target, training: Training, seed: int) -> Iterator[nn.Module]:
    """The target made trainable, and as it was after the with-block."""
    weights = list(target.model.parameters())
    with parking.kept(weights if training.full else [], target.folder):
        model = network.make_trainable(target.model, SFT(), training, label="the target", seed=seed)
        try:
            yield model
        finally:
            if not training.full:
                model.unload()  # type: ignore[operator]
            target.model.requires_grad_(False)
            target.model.eval()
            for weight in weights:
                weight.grad = None
