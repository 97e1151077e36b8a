"""The data sets of a run: which sources, by what right, and what they come to as tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import UsageError
from surgery.train.sources import Columns, Identity, read_rows
from surgery.train.step import TrainedMethod
from surgery.train.tokens import Example, tokenise

Sources = str | Path | Sequence[str | Path]

DEMO: Mapping[str, tuple[str, ...]] = {
    "aligned": ("demo:refusals", "demo:benign", "demo:lookalikes"),
    "harmful": ("demo:harmful",),
    "retain": ("demo:benign", "demo:lookalikes", "demo:refusals"),
}
"""What a `demo:` model is trained on where nothing else is given."""


@dataclass(frozen=True)
class DataSet:
    """One data set of a run, tokenised.

    Attributes:
        rows: Of all its sources, one after the other.
        sources: Which they are.
        cut: How many responses were cut at the length limit.
        dropped: How many rows were left out because their prompt alone reaches it.
    """

    rows: tuple[Example, ...]
    sources: tuple[Identity, ...]
    cut: int
    dropped: int

    def document(self) -> dict[str, Any]:
        """What of it goes into the manifest."""
        sources = [identity.document() for identity in self.sources]
        return {"sources": sources, "rows": len(self.rows), "cut": self.cut, "dropped": self.dropped}


def choose(method: TrainedMethod, model: str, given: Mapping[str, Sources]) -> dict[str, tuple[str, ...]]:
    """The sources of every data set that the method needs; those of the embedded pair for a `demo:` model.

    Raises:
        UsageError: A set is missing, or given and not used.
    """
    needed = method.sets()
    if unused := sorted(given.keys() - set(needed)):
        raise UsageError(
            f"{method.title} uses no {unused[0]} data here; leave it out (it uses {' and '.join(needed)})"
        )
    fallback = DEMO if model.startswith("demo:") else {}
    chosen = {name: _several(given[name]) if name in given else fallback.get(name, ()) for name in needed}
    for name, sources in chosen.items():
        if not sources:
            raise UsageError(
                f"{method.title} needs {name} data; give --{name}-data FILE, ORG/DATASET[:SPLIT] or demo:NAME"
            )
    return chosen


def _several(sources: Sources) -> tuple[str, ...]:
    return (str(sources),) if isinstance(sources, (str, Path)) else tuple(map(str, sources))


def load(
    chosen: Mapping[str, Sequence[str]], tokenizer: Any, max_length: int, columns: Columns
) -> dict[str, DataSet]:
    """The data sets, read and tokenised.

    Raises:
        InputError: A source cannot be used, or has nothing within `max_length` tokens.
    """
    return {name: _loaded(sources, tokenizer, max_length, columns) for name, sources in chosen.items()}


def _loaded(sources: Sequence[str], tokenizer: Any, max_length: int, columns: Columns) -> DataSet:
    read = [read_rows(source, columns) for source in sources]
    made = [tokenise(tokenizer, rows, max_length) for rows in read]
    return DataSet(
        rows=tuple(row for examples in made for row in examples.rows),
        sources=tuple(rows.identity for rows in read),
        cut=sum(examples.cut for examples in made),
        dropped=sum(examples.dropped for examples in made),
    )
