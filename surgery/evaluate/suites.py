"""How much is measured: two suites, and the options that change them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from annotated_doc import Doc

from surgery.attacking.settings import Budget
from surgery.choices import NEGATABLE, require_choices
from surgery.errors import UsageError

Suite = Literal["quick", "full"]

_BUDGETS: Mapping[str, Budget] = {
    "quick": Budget(
        attacks="harmful-finetune,refusal-ablation,prefill",
        learning_rates="5e-4",
        kinds="lora",
        steps=30,
        every=3,
        limit=48,
        max_new_tokens=40,
    ),
    "full": Budget(
        attacks="all", learning_rates="1e-4,5e-4,2e-3", seeds="0,1,2", steps=100, every=5, limit=100
    ),
}


@dataclass(frozen=True)
class Measuring:
    """What is measured of a model beside the attacks on it; every option not given is the suite's."""

    suite: Annotated[Suite, Doc("quick: minutes on a small model; full: every attack, three seeds.")] = (
        "quick"
    )
    rows: Annotated[int | None, Doc("Rows of each data set that utility is measured on.")] = None
    practice_steps: Annotated[
        int | None, Doc("Steps of the benign fine-tuning that trainability is read from.")
    ] = None
    practice_lr: Annotated[float, Doc("Learning rate of that fine-tuning, by LoRA.")] = 1e-3
    practice_seeds: Annotated[int, Doc("Seeds it is repeated with: of rows' order and adapter's start.")] = 3
    text_length: Annotated[int, Doc("Tokens of a window of the text that perplexity is measured on.")] = 256

    inside: Annotated[
        bool, Doc("Also look inside: condition numbers and what a short attack moves, by block."), NEGATABLE
    ] = True

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("rows", "practice_steps", "text_length"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UsageError(f"{name.replace('_', '-')} is {value}; it must be at least 2")
        if self.practice_seeds < 1:
            raise UsageError(f"practice-seeds is {self.practice_seeds}; it must be at least 1")
        if not 0 < self.practice_lr < float("inf"):
            raise UsageError(f"practice-lr is {self.practice_lr}; it must be a number above 0")

    def limit(self) -> int:
        """Rows of each data set."""
        return self.rows or {"quick": 64, "full": 200}[self.suite]

    def steps(self) -> int:
        """Of the benign fine-tuning."""
        return self.practice_steps or {"quick": 30, "full": 100}[self.suite]


def budget(suite: Suite, given: Mapping[str, Any]) -> Budget:
    """The attacker's budget of a suite, with the fields that were given on top."""
    return replace(_BUDGETS[suite], **given)
