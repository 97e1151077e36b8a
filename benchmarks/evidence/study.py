"""Runs what the ledger lacks: wave by wave, models one by one, then what is measured of them side by side."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.__main__ import machine
from benchmarks.evidence import columns, searching
from benchmarks.evidence.columns import BUILD, Column
from benchmarks.evidence.grounds import SEARCH, Ground
from benchmarks.evidence.ledger import Ledger, digest_of
from benchmarks.evidence.rows import CHOSEN, NONE, Row, named
from benchmarks.evidence.running import CommandFailedError, run
from surgery import methods
from surgery.train import presets
from surgery.train.sft import SFT
from surgery.train.step import TrainedMethod

Say = Callable[[str], None]

MODEL, MEASURED = "model", "measured"
_SETS = ("aligned", "harmful", "retain")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Study:
    """One ground's part of the study.

    Attributes:
        ground: Which.
        ledger: Where cells are kept.
        folder: Where commands run; models and studies are kept there for a run to come.
        processes: Measurements side by side, each on one core.
        say: Told of progress.
        columns: What is measured.
    """

    ground: Ground
    ledger: Ledger
    folder: Path
    processes: int
    say: Say
    columns: Sequence[Column] = columns.COLUMNS

    def run(self, only: Sequence[str] = ()) -> None:
        """Do everything the ledger lacks, or of it some rows; what fails is kept as failed, and the rest goes on.

        Raises:
            PackageUnavailableError: The real weights can be neither found nor downloaded.
            StoppedError: A command was interrupted; the next run takes it up.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = self.ground.prepare(self.folder)
        about = {"title": self.ground.title, "identity": identity, "processes": self.processes, **machine()}
        self.ledger.describe(self.ground.name, about)
        for wave in self.ground.waves:
            chosen = [name for name in wave if not only or name in only]
            if SEARCH in chosen:
                self._together(self._searches(identity))
            rows = [named(name) for name in chosen if name != SEARCH]
            for row in rows:
                if self._lacks(row, identity):
                    self._built(row, identity)
            self._together([one for row in rows for one in self._measurements(row, identity)])

    def _together(self, tasks: Sequence[Callable[[], None]]) -> None:
        with ThreadPoolExecutor(self.processes) as pool:
            for future in [pool.submit(task) for task in tasks]:
                future.result()

    def key(self, row: Row, column: str, identity: str) -> str:
        """What a cell depends on: the data, the models, and every word of the commands that lead to it."""
        words = [] if row.name == NONE else [*self._words(row), *_defaults(row)]
        under = self.key(named(row.on), BUILD, identity) if row.on else ""
        measured = {one.name: self._settings(one) for one in self.columns}.get(column, [])
        return digest_of(identity, self.ground.base, self.ground.aligned, words, under, measured)

    def _settings(self, column: Column) -> list[str]:
        """The options that a column's figures depend on."""
        ground = self.ground
        own = {
            "harmful": (*ground.attack, *ground.sweep, ground.confirm),
            "benign": (*ground.attack, *ground.benign),
        }
        return list(own.get(column.name, ground.evaluate))

    def _lacks(self, row: Row, identity: str) -> bool:
        """Whether anything of a row is to be done."""
        names = [BUILD, *(column.name for column in self.columns)]
        return any(self._cell(row, name, identity) is None for name in names)

    def _cell(self, row: Row, column: str, identity: str) -> dict[str, Any] | None:
        try:
            return self.ledger.cell(self.ground.name, row.name, column, self.key(row, column, identity))
        except searching.NothingChosenError:
            return None

    def _model(self, row: Row) -> str:
        return self.ground.aligned if row.name == NONE else f"{row.name}/{MODEL}"

    def _words(self, row: Row) -> Iterator[str]:
        """The command that makes a row's model, without its output."""
        ground = self.ground
        models = {"base": ground.base, "aligned": ground.aligned} | (
            {row.on: f"{row.on}/{MODEL}"} if row.on else {}
        )
        control = row.method == "sft"
        yield from ("python", "-m", "benchmarks.evidence.plain") if control else ("surgery", row.method)
        yield from (word.format(**models) for word in row.command[1:])
        if row.options == (CHOSEN,):
            yield from searching.chosen(self.ledger, ground)
        elif row.method != "lox":
            yield from self._training(row.method)
        else:
            yield from row.options

    def _training(self, method: str) -> Iterator[str]:
        """Options of a trained method on this ground, its data among them."""
        needs = _trained(method).data
        for name in _SETS:
            if name in needs and name in self.ground.data:
                yield from (f"--{name}-data", self.ground.data[name])
        yield from self.ground.training.get(method, ())

    def _built(self, row: Row, identity: str) -> None:
        """Make a row's model, unless it is there as this key wants it."""
        if row.on:
            self._built(named(row.on), identity)
        mark = self.folder / row.name / "made"
        try:
            key = self.key(row, BUILD, identity)
        except searching.NothingChosenError as error:
            self._keep(row.name, BUILD, {"state": "failed", "key": "", "error": str(error)})
            return
        if mark.is_file() and mark.read_text() == key and self._cell(row, BUILD, identity):
            return
        shutil.rmtree(mark.parent, ignore_errors=True)
        mark.parent.mkdir(parents=True)
        if row.name == NONE:
            self._keep(row.name, BUILD, {"state": "done", "key": key, "commands": [], "figures": {}})
        else:
            self.say(f"{self.ground.name}: {row.name}: build")
            output = f"{row.name}/{MODEL}"
            self._carry_out(row.name, BUILD, key, iter([[*self._words(row), "-o", output]]), dict, None)
        mark.write_text(key)

    def _measurements(self, row: Row, identity: str) -> list[Callable[[], None]]:
        """What is still to be measured of a row; nothing where there is no model."""
        if self._cell(row, BUILD, identity) is None:
            return []
        lacking = [column for column in self.columns if self._cell(row, column.name, identity) is None]
        return [partial(self._measure, row, column, identity) for column in lacking]

    def _measure(self, row: Row, column: Column, identity: str) -> None:
        key = self.key(row, column.name, identity)
        output = f"{row.name}/{MEASURED}-{column.name}-{key}"
        self.say(f"{self.ground.name}: {row.name}: {column.name}")
        commands = column.commands(self.ground, self._model(row), output, self.folder)
        self._carry_out(row.name, column.name, key, commands, partial(column.read, self.folder / output), 1)

    def _searches(self, identity: str) -> list[Callable[[], None]]:
        """The sweeps of LoX's settings that are not done."""
        ground = self.ground
        tasks: list[Callable[[], None]] = []
        for number, options in enumerate(ground.search):
            words = ["surgery", "sweep", "lox", ground.base, ground.aligned, *options, *ground.probe]
            key = digest_of(identity, words)
            if self.ledger.cell(ground.name, SEARCH, f"{SEARCH}-{number}", key) is None:
                tasks.append(partial(self._search, f"{SEARCH}-{number}", words, key))
        return tasks

    def _search(self, name: str, words: list[str], key: str) -> None:
        """One sweep; its trials are kept in a folder of that key."""
        (self.folder / SEARCH).mkdir(exist_ok=True)
        output = f"{SEARCH}/{key}"
        self.say(f"{self.ground.name}: {SEARCH}: {' '.join(words[3:9])} ...")
        read = partial(searching.read, self.folder / output)
        self._carry_out(SEARCH, name, key, iter([[*words, "-o", output]]), read, 1)

    def _carry_out(
        self, row: str, column: str, key: str, commands: Iterator[list[str]], read: Callable[[], dict[str, Any]],
        threads: int | None,
    ) -> None:  # fmt: skip
        """Run the commands of a cell and keep its figures, or why there are none."""
        log = self.folder / row / f"{column}.log"
        told: dict[str, Any] = {"key": key, "commit": commit(), "date": datetime.now(UTC).date().isoformat()}
        ran = []
        try:
            for words in commands:
                ran.append(run(words, self.folder, log, threads=threads))
            told |= {"state": "done", "figures": read()}
        except CommandFailedError as error:
            told |= {"state": "failed", "error": str(error)}
            self.say(f"{self.ground.name}: {row}: {column}: {error}")
        told |= {"commands": [one.words for one in ran], "wall": round(sum(one.wall for one in ran), 1)}
        told["peak"] = round(max((one.peak for one in ran), default=0.0), 1)
        self._keep(row, column, told)

    def _keep(self, row: str, column: str, cell: dict[str, Any]) -> None:
        self.ledger.put(self.ground.name, row, column, cell)


def _trained(method: str) -> type[TrainedMethod]:
    return SFT if method == "sft" else methods.get(method)


def _defaults(row: Row) -> list[str]:
    """What a method does where its command says nothing: a change of that is another row."""
    if row.method in ("", "lox"):
        return []
    kind = _trained(row.method)
    return [json.dumps(presets.defaults(kind, preset), sort_keys=True) for preset in ("paper", "small")]


def commit() -> str:
    """The commit that is measured."""
    words = ["git", "rev-parse", "--short=12", "HEAD"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def cores() -> int:
    """Cores there are for measurements side by side."""
    return len(os.sched_getaffinity(0))
