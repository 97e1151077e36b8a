"""What a training method is handed at each step, and the verb it answers with."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One micro-batch of tokenised rows, padded on the right.

    Attributes:
        tokens: Token ids.
        attended: True where there is a token, False on padding.
        answered: True on tokens of the response, whose prediction the loss is about; False on prompt and padding.
    """

    tokens: Int[Tensor, "rows length"]
    attended: Bool[Tensor, "rows length"]
    answered: Bool[Tensor, "rows length"]


Batches = Mapping[str, Sequence[Batch]]
"""All micro-batches of a step on this process, by stream; mostly the data sets: aligned, harmful, retain."""


@dataclass(frozen=True)
class Stream:
    """Rows that the batches of a run are drawn from.

    Attributes:
        rows: Tokenised rows.
        batches: How many batches a step takes.
        order: Streams with the same text here and as many rows are drawn in the same order; the stream's own name
            where empty.
    """

    rows: Sequence[Any]
    batches: int = 1
    order: str = ""


def batch_by_batch(parts: Sequence[Batch], batches: int) -> list[Sequence[Batch]]:
    """The micro-batches of a stream, those of each of its `batches` batches together."""
    each = len(parts) // batches
    return [parts[index * each : (index + 1) * each] for index in range(batches)]


@dataclass
class Step:
    """Where training stands, and what couples the parts of a step.

    Attributes:
        number: From 0.
        total: Steps of the whole run.
        seed: Of the run; what a method draws comes from this and `number`, so that a resumed run draws the same.
        backward: Adds the gradient of a scalar to the trainable parameters (accelerate's, or `Tensor.backward`).
        summed: The sum of a tensor over all processes; the identity for one process.
        join: Makes the gradients of weights those of all processes together, for methods that need them within a
            step. The loop joins what `backward` leaves, which must therefore be this process's own.
        folder: Where there is room for files with what a step puts aside; the system's by default.
        parked: Puts the optimiser's state out of memory inside a with-block.
        original: Makes the model what it was when the run began, inside a with-block; only for a method that
            `compares`.
        memory: What the method carries from step to step: tensors, numbers, lists; saved with the run.
    """

    number: int
    total: int
    seed: int = 0
    backward: Callable[[Tensor], None] = torch.Tensor.backward
    summed: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)
    join: Callable[[Sequence[nn.Parameter]], None] = field(default=lambda weights: None)
    folder: Path | None = None
    parked: Callable[[], AbstractContextManager[None]] = nullcontext
    original: Callable[[], AbstractContextManager[None]] = nullcontext
    memory: dict[str, Any] = field(default_factory=dict)


ADAPTED: Mapping[str, Any] = {
    "schedule": "cosine",
    "warmup": 0.1,
    "weight_decay": 0.0,
    "lora_rank": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
}
"""A preset's part that methods share whose papers train all weights, or no language model."""


@dataclass(frozen=True)
class TrainedMethod(ABC):
    """A frozen record of hyperparameters with one verb, `backward`.

    Attributes:
        name: As the command spells it.
        title: As people write it.
        paper: Where it comes from.
        data: The data sets it can use, of aligned, harmful and retain.
        compares: Whether a step looks at the model as it was when the run began.
        whole: Whether it is meant to train all weights, where there is memory for them.
        presets: Under `paper` and `small`, values of its own fields and of those of `Training`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    data: ClassVar[tuple[str, ...]]
    compares: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abstractmethod
    def equation(self) -> str:
        """What is minimised, with numbers, in one line."""

    def sets(self) -> tuple[str, ...]:
        """The data sets that this record needs; all of `data`, if not overridden."""
        return self.data

    def layers(self, depth: int) -> range:
        """The decoder blocks it trains, from 0, of a model that has `depth` of them; all, if not overridden."""
        return range(depth)

    def streams(self, rows: Mapping[str, Sequence[Any]], seed: int) -> dict[str, Stream]:
        """What its batches are drawn from, of the rows of its data sets; one batch of each set, if not overridden.

        Raises:
            InputError: The rows do not do for the method.
        """
        del seed
        return {name: Stream(own) for name, own in rows.items()}

    def signs(self, first: Mapping[str, float], last: Mapping[str, float]) -> tuple[str, ...]:
        """What the terms of the loss warn of, of the first step and of the last, a line each; nothing by default."""
        del first, last
        return ()

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Checks that the model can be trained so, by structure, and freezes what the method never trains."""

    @abstractmethod
    def backward(self, model: nn.Module, batches: Batches, step: Step) -> dict[str, float]:
        """Adds this step's gradients to the trainable parameters; returns the terms of the loss by name."""
