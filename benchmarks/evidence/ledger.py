"""`docs/evidence.json`: every cell of the study, kept as it is found.

A cell is what one column says of one row on one ground: its state (`done` or `failed`), the commands that a reader
can repeat, the commit, the date, how long it took, and the figures. It stands under a key that changes with whatever
they depend on; a cell under another key counts as not there, so that a study goes on where it was interrupted and
does again what was changed.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.documents import write_text

Cell = dict[str, Any]


def digest_of(*parts: object) -> str:
    """Twelve hex digits that change with any of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


class Ledger:
    """The cells of all grounds.

    Args:
        path: The file, there may be none yet; one process writes it at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self.document: dict[str, Any] = {"schema": 1, "grounds": {}}
        if path.is_file():
            self.document = json.loads(path.read_text())

    def ground(self, name: str) -> dict[str, Any]:
        """What is known of a ground: `about`, `rows` with the cells of each by column, `from_nothing` once timed."""
        found: dict[str, Any] = self.document["grounds"].setdefault(name, {"about": {}, "rows": {}})
        return found

    def forget(self, name: str) -> None:
        """Drop all that is known of a ground."""
        self.document["grounds"].pop(name, None)
        self._write()

    def describe(self, ground: str, about: Mapping[str, Any]) -> None:
        """Say what a ground is."""
        self.ground(ground)["about"] = dict(about)
        self._write()

    def timed(self, ground: str, run: Mapping[str, Any]) -> None:
        """Keep what one run of a ground from nothing to its end took."""
        self.ground(ground)["from_nothing"] = dict(run)
        self._write()

    def cell(self, ground: str, row: str, column: str, key: str | None = None) -> Cell | None:
        """A finished cell; None where there is none under this key, or the last try failed."""
        found: Cell | None = self.ground(ground)["rows"].get(row, {}).get(column)
        if found is None or found["state"] != "done" or (key is not None and found["key"] != key):
            return None
        return found

    def put(self, ground: str, row: str, column: str, cell: Mapping[str, Any]) -> None:
        """Keep a cell, in the file at once; from any thread."""
        with self._lock:
            self.ground(ground)["rows"].setdefault(row, {})[column] = dict(cell)
            self._write()

    def _write(self) -> None:
        write_text(self.path, dumped(self.document))


def dumped(document: Mapping[str, Any]) -> str:
    """JSON that a person can read and a diff can show: figures and the points of a curve on one line each."""
    return _text(document, "") + "\n"


def _text(value: Any, indent: str) -> str:
    flat = json.dumps(value, allow_nan=False)
    if not isinstance(value, (dict, list)) or not value or (len(flat) <= 110 and not _deep(value)):
        return flat
    inner = indent + " "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key)}: {_text(one, inner)}" for key, one in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if all(isinstance(one, (int, float, str)) for one in value):
        return flat
    return "[\n" + ",\n".join(inner + _text(one, inner) for one in value) + f"\n{indent}]"


def _deep(value: Any) -> bool:
    """Whether a document holds documents of documents."""
    inside = value.values() if isinstance(value, dict) else value
    return any(
        isinstance(one, dict) and any(isinstance(more, dict) for more in one.values()) for one in inside
    )
