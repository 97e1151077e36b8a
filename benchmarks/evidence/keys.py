"""The command behind each cell, and the key that its figures stand under."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence import searching
from benchmarks.evidence.grounds import GROUNDS, SEARCH, SEEDS, Ground, search_on
from benchmarks.evidence.ledger import Ledger, digest_of
from benchmarks.evidence.rows import CHOSEN, NONE, Row, named
from surgery import methods
from surgery.train import presets
from surgery.train.sft import SFT
from surgery.train.step import TrainedMethod

BUILD = "build"
"""The column of what it takes to make the row's model."""

MODEL = "model"
"""Where in its folder a row keeps its model."""

_SETS = ("aligned", "harmful", "retain")

# Options of training that came when there were figures, with the values at which they do nothing.
_LATER = {"spare": 0.0}

Cells = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Keys:
    """Commands and keys of one ground.

    Attributes:
        ground: Which.
        ledger: With the search that some commands depend on.
        identity: Of the ground's models and data.
    """

    ground: Ground
    ledger: Ledger
    identity: str

    def row(self, row: Row, column: str) -> str:
        """What a cell depends on: the data, the models, and every word of the commands that lead to it.

        Raises:
            NothingChosenError: The search is to choose the row's options, and has not.
        """
        words = [] if row.name == NONE else [*self.words(row), *_defaults(row.method)]
        under = self.row(named(row.on), BUILD) if row.on else ""
        ground = self.ground
        return digest_of(self.identity, ground.base, ground.aligned, words, under, self._settings(column))

    def search(self, name: str, number: int) -> str:
        """What a sweep of a search depends on."""
        search = self.ground.searches[name]
        under = [] if search.on == NONE else [self.row(named(search.on), BUILD)]
        base = self.search_base(name, number)
        under += [self.base(base)] if base else []
        return digest_of(self.identity, self.search_words(name, number), *under, *_defaults(search.method))

    def search_base(self, name: str, number: int) -> str:
        """The base that a sweep names in place of the ground's; empty where it names none."""
        first = self.ground.searches[name].sweeps[number][0]
        return "" if first.startswith("--") else first

    def base(self, name: str) -> str:
        """What a base made for searches depends on."""
        return digest_of(self.identity, self.ground.bases[name])

    def _settings(self, column: str) -> list[str]:
        """The options that a column's figures depend on."""
        ground = self.ground
        own = {
            "harmful": (*ground.attack, *(word for grid in ground.sweeps for word in grid), ground.confirm),
            "benign": (*ground.attack, *ground.benign),
            "mixed": (*ground.attack, *ground.mixed),
            "openings": (*ground.attack, *ground.openings),
            "reach": ground.reach,
            "evaluate": ground.evaluate,
            "seeds": (*SEEDS, *ground.evaluate),
        }
        return list(own.get(column, ()))

    def search_words(self, name: str, number: int) -> list[str]:
        """A sweep of a search, without its output."""
        ground, search = self.ground, self.ground.searches[name]
        model = ground.aligned if search.on == NONE else f"{search.on}/{MODEL}"
        base = self.search_base(name, number)
        options = search.sweeps[number][1:] if base else search.sweeps[number]
        models = [base or ground.base, model] if search.method == "lox" else [model]
        return ["surgery", "sweep", search.method, *models, *options, *search.fixed, *ground.probe]

    def words(self, row: Row) -> Iterator[str]:
        """The command that makes a row's model, without its output.

        Raises:
            NothingChosenError: The search is to choose its options, and has not.
        """
        ground = self.ground
        models = {"base": ground.base, "aligned": ground.aligned}
        models |= {row.on: f"{row.on}/{MODEL}"} if row.on else {}
        control = row.method == "sft"
        yield from ("python", "-m", "benchmarks.evidence.plain") if control else ("surgery", row.method)
        yield from (word.format(**models) for word in row.command[1:])
        if row.options == (CHOSEN,):
            yield from searching.chosen(searching.trials(self.current_searches(search_on(row.on or NONE))))
        elif row.method == "lox":
            yield from row.options
        else:
            yield from self._training(row)

    def _training(self, row: Row) -> Iterator[str]:
        """Options of a trained row on this ground, its data among them."""
        # As it is by default: TAR has aligned rows for preferences alone.
        needs = _trained(row.method)().sets()
        for name in _SETS:
            if name in needs and name in self.ground.data:
                yield from (f"--{name}-data", self.ground.data[name])
        yield from self.ground.training.get(row.name, ())

    def sweeps(self, name: str) -> Mapping[str, int]:
        """The sweeps of a search: their numbers by the names of their cells."""
        return {f"{SEARCH}-{number}": number for number in range(len(self.ground.searches[name].sweeps))}

    def current_searches(self, name: str = SEARCH) -> Cells:
        """The sweeps of a search that are done as the ground has them."""
        found = {
            cell: self.ledger.cell(self.ground.name, name, cell, self.search(name, number))
            for cell, number in self.sweeps(name).items()
        }
        return {cell: kept for cell, kept in found.items() if kept is not None}

    def fits(self, row: str, column: str, key: str) -> bool:
        """Whether a cell stands under the key that it has now."""
        try:
            return self.row(named(row), column) == key
        except (searching.NothingChosenError, KeyError):
            # The search that is to choose its options was not run, or it is a row of old.
            return False


def current(ledger: Ledger, ground: str) -> dict[str, Cells]:
    """The cells of a ground, finished or failed, that are of the study as it is now: others count as not run."""
    known = ledger.ground(ground)
    keys = Keys(GROUNDS[ground], ledger, known["about"].get("identity", ""))
    found = {
        row: {column: cell for column, cell in cells.items() if keys.fits(row, column, cell["key"])}
        for row, cells in known["rows"].items()
        if not row.startswith(SEARCH)
    }
    return found | {name: keys.current_searches(name) for name in keys.ground.searches}


def _trained(method: str) -> type[TrainedMethod]:
    return SFT if method == "sft" else methods.get(method)


def _defaults(method: str) -> list[str]:
    """What a method does where its command says nothing: a change of that is another row."""
    if method in ("", "lox"):
        return []
    usual = [presets.defaults(_trained(method), preset) for preset in ("paper", "small")]
    known = [dict(pair for pair in one.items() if pair not in _LATER.items()) for one in usual]
    return [json.dumps(one, sort_keys=True) for one in known]
