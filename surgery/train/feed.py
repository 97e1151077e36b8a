"""Which rows make up which step, and the padded batches of one process.

The order comes from the seed and the number of the step alone: a resumed run needs no position, and neither the
number of processes nor that of micro-batches changes what a step trains on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from surgery.errors import UsageError
from surgery.train.seeding import seeded
from surgery.train.step import Batch, Batches, Stream
from surgery.train.tokens import Example


def drawn(count: int, begin: int, end: int, *parts: int | str) -> list[int]:
    """Places `begin` to `end` of an endless sequence of shuffles of `range(count)`, seeded by `parts`."""
    rounds = range(begin // count, (end - 1) // count + 1)
    shuffled = [
        torch.randperm(
            count, generator=torch.Generator().manual_seed(seeded(*parts, "round", number))
        ).tolist()
        for number in rounds
    ]
    flat = [index for shuffle in shuffled for index in shuffle]
    return flat[begin - rounds[0] * count : end - rounds[0] * count]


def padded(examples: Sequence[Example], pad: int, device: torch.device | None = None) -> Batch:
    """A micro-batch of these rows, padded on the right to the longest."""
    rows, length = len(examples), max(len(example.tokens) for example in examples)
    tokens = torch.full((rows, length), pad, dtype=torch.int64)
    attended, answered = torch.zeros(2, rows, length, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        attended[row, : len(example.tokens)] = True
        answered[row, example.prompt : len(example.tokens)] = True
    return Batch(tokens.to(device), attended.to(device), answered.to(device))


@dataclass(frozen=True)
class Feed:
    """The batches of every step for one process of a run.

    Attributes:
        streams: What a step draws from, by name.
        size: Rows of a batch, over all processes.
        micro: Micro-batches a process makes of its share of a batch.
        seed: Of the run.
        pad: The id of padding.
        device: Where the batches go.
        rank: Of this process.
        world: How many processes there are.
    """

    streams: Mapping[str, Stream]
    size: int
    micro: int = 1
    seed: int = 0
    pad: int = 0
    device: torch.device | None = None
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.size < self.world * self.micro:
            raise UsageError(
                f"batch-size is {self.size}, and {self.world} processes with {self.micro} micro-batches each need "
                f"{self.world * self.micro} rows in a step; raise --batch-size or lower --gradient-accumulation"
            )

    def step(self, number: int) -> Batches:
        """The micro-batches of step `number` (from 0) on this process, batch after batch, by stream."""
        return {
            name: [
                part
                for index in range(number * stream.batches, (number + 1) * stream.batches)
                for part in self._batch(stream, stream.order or name, index)
            ]
            for name, stream in self.streams.items()
        }

    def _batch(self, stream: Stream, order: str, index: int) -> list[Batch]:
        """This process's micro-batches of the batch with that index, counted from the start of the run."""
        rows = drawn(len(stream.rows), index * self.size, (index + 1) * self.size, self.seed, order)
        parts = self.world * self.micro
        own = range(self.rank * self.micro, (self.rank + 1) * self.micro)
        bounds = [(part * self.size // parts, (part + 1) * self.size // parts) for part in own]
        return [
            padded([stream.rows[row] for row in rows[begin:end]], self.pad, self.device)
            for begin, end in bounds
        ]
