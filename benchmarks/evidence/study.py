"""Runs what the ledger lacks: wave by wave, models first, then what is measured of them."""

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.__main__ import ROOT, commit, machine
from benchmarks.evidence import columns, searching
from benchmarks.evidence.columns import EVALUATE, KEPT, Column
from benchmarks.evidence.grounds import SEARCH, Ground
from benchmarks.evidence.keys import BUILD, MODEL, Keys
from benchmarks.evidence.ledger import Ledger
from benchmarks.evidence.rows import CHOSEN, NONE, Row, named
from benchmarks.evidence.running import CommandFailedError, run

Say = Callable[[str], None]

MEASURED = "measured"


def processor() -> str:
    """What rounds the figures: the processor, with the features that kernels choose by."""
    about = machine()
    return f"{about['processor']} ({', '.join(map(str, about['features']))})"


def code() -> str:
    """The commit, marked where what measures differs from it; the page and the ledger do while a study runs."""
    parts = ["git", "status", "--porcelain", "--", "surgery", "cli", "kernels", "benchmarks"]
    changed = subprocess.run(parts, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return f"{commit()}{'-changed' if changed else ''}"


@dataclass(frozen=True)
class Study:
    """One ground's part of the study.

    Attributes:
        ground: Which.
        ledger: Where cells are kept.
        folder: Where commands run; models and studies are kept there for a run to come.
        processes: Commands side by side, each on one core.
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
        keys = Keys(self.ground, self.ledger, identity)
        for wave in self.ground.waves:
            chosen = [name for name in wave if not only or name in only]
            rows = [named(name) for name in chosen if name not in self.ground.searches]
            after = [row for row in rows if CHOSEN in row.options]
            self._models([row for row in rows if row not in after and self._lacks(row, keys)], keys)
            self._searched([name for name in chosen if name in self.ground.searches], keys)
            self._models([row for row in after if self._lacks(row, keys)], keys)
            self._reference(rows, keys)
            self._together([one for row in rows for one in self._measurements(row, keys)], self.processes)

    def _together(self, tasks: Sequence[Callable[[], None]], processes: int) -> None:
        """Tasks side by side; where one is interrupted, those that have not begun are left."""
        with ThreadPoolExecutor(processes) as pool:
            try:
                for future in [pool.submit(task) for task in tasks]:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _models(self, rows: Sequence[Row], keys: Keys) -> None:
        """Make the models of rows, those that others start from before these."""
        first = {row.on or row.name: None for row in rows}
        processes = 1 if self.ground.one_by_one else self.processes
        for some in (map(named, first), filter(lambda row: row.on, rows)):
            self._together([partial(self._built, row, keys) for row in some], processes)

    def _reference(self, rows: Sequence[Row], keys: Keys) -> None:
        """Evaluate the undefended model again, where rows could take that up and only its figures are there."""
        bare = named(NONE)
        cell = self._cell(bare, EVALUATE, keys)
        asked = any(column.name == EVALUATE for row in rows for column in self._lacking(row, keys))
        if cell is None or not asked:
            return
        output = f"{NONE}/{MEASURED}-{EVALUATE}-{cell['key']}"
        if (self.folder / output / KEPT).exists():
            return
        self.say(f"{self.ground.name}: {NONE}: {EVALUATE}, for others to take up")
        [column] = [one for one in self.columns if one.name == EVALUATE]
        (self.folder / NONE).mkdir(exist_ok=True)
        try:
            for words in column.commands(self.ground, self._model(bare), output, self.folder):
                run(words, self.folder, self.folder / NONE / f"{EVALUATE}.log")
        except CommandFailedError as error:
            self.say(f"{self.ground.name}: {NONE}: {error}")

    def _lacks(self, row: Row, keys: Keys) -> bool:
        """Whether anything of a row is to be done."""
        return self._cell(row, BUILD, keys) is None or bool(self._lacking(row, keys))

    def _lacking(self, row: Row, keys: Keys) -> list[Column]:
        """What is still to be measured of a row."""
        return [
            column
            for column in self.columns
            if column.covers(row.name, self.ground.name) and self._cell(row, column.name, keys) is None
        ]

    def _cell(self, row: Row, column: str, keys: Keys) -> dict[str, Any] | None:
        try:
            return self.ledger.cell(self.ground.name, row.name, column, keys.row(row, column))
        except searching.NothingChosenError:
            return None

    def _model(self, row: Row) -> str:
        return self.ground.aligned if row.name == NONE else f"{row.name}/{MODEL}"

    def _built(self, row: Row, keys: Keys) -> None:
        """Make a row's model, unless it is there as this key wants it; what it starts from is there."""
        mark = self.folder / row.name / "made"
        try:
            key = keys.row(row, BUILD)
        except searching.NothingChosenError as error:
            self._keep(row.name, BUILD, {"state": "failed", "key": "", "error": str(error)})
            return
        if mark.is_file() and mark.read_text() == key and self._cell(row, BUILD, keys):
            return
        shutil.rmtree(mark.parent, ignore_errors=True)
        mark.parent.mkdir(parents=True)
        if row.name == NONE:
            self._keep(row.name, BUILD, {"state": "done", "key": key, "commands": [], "figures": {}})
        else:
            self.say(f"{self.ground.name}: {row.name}: build")
            output, before = f"{row.name}/{MODEL}", self._cell(row, BUILD, keys)
            commands = iter([[*keys.words(row), "-o", output]])
            self._carry_out(row.name, BUILD, key, commands, dict, None if self.ground.one_by_one else 1)
            if before is not None and self._cell(row, BUILD, keys) is not None:
                # Only the folder was gone: what the model costs was measured, maybe on a quieter machine.
                self._keep(row.name, BUILD, before)
        mark.write_text(key)

    def _measurements(self, row: Row, keys: Keys) -> list[Callable[[], None]]:
        """What is still to be measured of a row; nothing where there is no model."""
        if self._cell(row, BUILD, keys) is None:
            return []
        return [partial(self._measure, row, column, keys) for column in self._lacking(row, keys)]

    def _measure(self, row: Row, column: Column, keys: Keys) -> None:
        key = keys.row(row, column.name)
        output = f"{row.name}/{MEASURED}-{column.name}-{key}"
        self.say(f"{self.ground.name}: {row.name}: {column.name}")
        commands = column.commands(self.ground, self._model(row), output, self.folder)
        self._carry_out(row.name, column.name, key, commands, partial(column.read, self.folder / output), 1)

    def _searched(self, names: Sequence[str], keys: Keys) -> None:
        """The sweeps of searches that are not done."""
        lacking = []
        for name in names:
            done, on = keys.current_searches(name), self.ground.searches[name].on
            sweeps = [(cell, number) for cell, number in keys.sweeps(name).items() if cell not in done]
            if sweeps and on != NONE:
                self._models([named(on)], keys)
            for base in sorted({keys.search_base(name, number) for _, number in sweeps} - {""}):
                self._based(base, keys)
            lacking += [partial(self._search, name, cell, number, keys) for cell, number in sweeps]
        self._together(lacking, self.processes)

    def _based(self, name: str, keys: Keys) -> None:
        """Make a base that sweeps name, unless it is there as wanted; where it fails, the sweep does too."""
        output, mark = self.folder / name, self.folder / f"{name}-{keys.base(name)}"
        if mark.exists():
            return
        shutil.rmtree(output, ignore_errors=True)
        self.say(f"{self.ground.name}: {name}")
        try:
            run([*self.ground.bases[name], "-o", name], self.folder, output.with_suffix(".log"))
            mark.touch()
        except CommandFailedError as error:
            self.say(f"{self.ground.name}: {name}: {error}")

    def _search(self, name: str, cell: str, number: int, keys: Keys) -> None:
        """One sweep; its trials are kept in a folder of its key."""
        words, key = keys.search_words(name, number), keys.search(name, number)
        (self.folder / name).mkdir(exist_ok=True)
        output = f"{name}/{key}"
        self.say(f"{self.ground.name}: {name}: {' '.join(words[3:9])} ...")
        read = partial(searching.read, self.folder / output, keys.search_base(name, number))
        words += [*self.ground.spared.get(SEARCH, ()), "-o", output]
        self._carry_out(name, cell, key, iter([words]), read, 1)

    def _carry_out(
        self, row: str, column: str, key: str, commands: Iterator[list[str]], read: Callable[[], dict[str, Any]],
        threads: int | None,
    ) -> None:  # fmt: skip
        """Run the commands of a cell and keep its figures, or why there are none."""
        log = self.folder / row / f"{column}.log"
        told: dict[str, Any] = {"key": key, "commit": code(), "date": datetime.now(UTC).date().isoformat()}
        told["processor"] = processor()
        ran = []
        try:
            for words in commands:
                ran.append(run(words, self.folder, log, threads=threads))
            told |= {"state": "done", "figures": read()}
        except (CommandFailedError, OSError, ValueError, KeyError, TypeError) as error:
            # The others: what a command left behind is not what is read of it.
            told |= {"state": "failed", "error": str(error) or type(error).__name__}
            self.say(f"{self.ground.name}: {row}: {column}: {error}")
        told |= {"commands": [one.words for one in ran], "wall": round(sum(one.wall for one in ran), 1)}
        told["peak"] = round(max((one.peak for one in ran), default=0.0), 1)
        self._keep(row, column, told)

    def _keep(self, row: str, column: str, cell: dict[str, Any]) -> None:
        self.ledger.put(self.ground.name, row, column, cell)
