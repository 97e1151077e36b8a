"""What every attack offers: a frozen record with a budget, and one verb, `carry_out`.

An attack works on a model in memory and leaves it bit for bit as it was; nothing here writes weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from surgery.checkpoint.layout import Checkpoint
from surgery.train.sources import Rows


def _as_it_is(prompt: str) -> str:
    return prompt


@dataclass(frozen=True)
class Approach:
    """How a model under attack is asked.

    Attributes:
        ask: What becomes of a request.
        prefix: What the answer is made to begin with.
    """

    ask: Callable[[str], str] = _as_it_is
    prefix: str = ""


PLAIN = Approach()
"""The request as it is."""

Watch = Callable[[int, Approach], None]
"""Called with the optimiser's steps taken so far and the way to ask, while the model is in its attacked state."""


class Settled(Exception):  # noqa: N818 - no error: what was to be seen has been
    """Raised by a watch that needs no further look: an attack that trains ends there, the model as it was."""


@dataclass(frozen=True)
class Target:
    """A model to attack.

    Attributes:
        model: A causal language model in float32, in eval mode, none of whose parameters needs a gradient.
        tokenizer: Its tokenizer.
        data: What attackers have, by name: `harmful` (requests with compliant answers), `refusals` (the same kind of
            requests, refused), `benign` (innocent requests with answers). None of it is used to measure.
        base: The checkpoint before alignment, where the attacker has it.
        seed: Of what is drawn once for all attacks; an attack's own seed is a field of it.
        max_length: Tokens of a row.
        device: Where the model is.
        folder: Where there is room for what is put aside; the system's by default.
    """

    model: nn.Module
    tokenizer: Any
    data: Mapping[str, Rows]
    base: Checkpoint | None = None
    seed: int = 0
    max_length: int = 512
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    folder: Path | None = None


@dataclass(frozen=True)
class Attack(ABC):
    """A frozen record of what an attacker does and may spend.

    Attributes:
        name: As the command spells it.
        title: As people write it.
        paper: Where it comes from.
        needs: What of `Target` it cannot do without: names of data, `base`.
        trains: Whether it takes steps of an optimiser, so that harm is a curve over steps.
        outside: Whether it lies outside what the defences here are trained against.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = False
    outside: ClassVar[bool] = False

    def budget(self) -> dict[str, Any]:
        """Everything that says how much the attacker may do: the fields of the record."""
        return {"attack": self.name, **asdict(self)}

    @abstractmethod
    def carry_out(self, target: Target, watch: Watch) -> None:
        """Attack, calling `watch` in the attacked state; afterwards the model is bit for bit what it was.

        An attack that trains calls it at step 0, before anything was done, at every stride and at the end, or until
        it raises `Settled`; any other attack calls it once, with 0 steps.

        Raises:
            InputError: The model or the data do not allow this attack.
        """
