"""A study that any number of processes work on."""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from surgery.errors import InputError
from surgery.studying import pieces
from surgery.studying.slots import Finished, Slot, group
from surgery.studying.space import Search, Space
from surgery.studying.storages import Storage, open_storage, telling
from surgery.studying.trial import Params, Trial, hold

LEASE = 120.0
"""Seconds without a sign of life after which a trial of a process on another host is given to the next."""

_LOOK_AGAIN = 2.0
_SHOWN = 60


class Study:
    """Trials that are planned, claimed and kept.

    A study is open to more: what another process planned, this one runs too.
    """

    def __init__(self, storage: Storage, lease: float) -> None:
        self._storage = storage
        self._lease = lease
        self._search: Search | None = None

    @classmethod
    def open(
        cls,
        place: str | Path,
        name: str,
        *,
        identity: Mapping[str, Any],
        create: bool = True,
        lease: float = LEASE,
    ) -> "Study":
        """The study of a name, as it is there, or a new one.

        Args:
            place: A folder, which gets a journal; or the URL of a database, such as sqlite:///study.db.
            name: Of the study; one place can have many.
            identity: What its trials mean (of which model, data and options they are), of JSON's kinds.
            create: Whether to make it if it is not there.
            lease: Seconds after which a process that gives no sign of life counts as dead.

        Raises:
            UsageError: Optuna is not installed, or the place is none.
            InputError: The study there is of another identity, is damaged, or is not there.
            AccessError: The database cannot be reached.
        """
        study = cls(open_storage(place, name, create=create), lease)
        study._agree("identity", identity)
        return study

    def add(self, params_list: Iterable[Params]) -> None:
        """Plan trials, in this order, that are not planned yet."""
        wanted = (
            (json.dumps(params, sort_keys=True), {"params": dict(params)})
            for params in map(dict, params_list)
        )
        self._plan(dict(wanted))

    def search(self, space: Space, count: int, seed: int) -> None:
        """Let so many trials in all be drawn, by whichever processes run them, to maximise their first value.

        Args:
            space: By the name of a parameter: ("log", low, high), ("int", low, high) or a sequence of choices.
            count: Trials of the search, by all processes together; a larger one than before adds to it.
            seed: Of the draws.

        Raises:
            UsageError: The space is empty somewhere.
            InputError: The study holds a search of another space or seed.
        """
        search = Search(space, seed)
        self._agree("search", search.document())
        self._search = search
        self._plan({f"search {index}": {"search": index} for index in range(count)})

    def claim(self, patience: float = 0.0) -> Trial | None:
        """The next trial that waits, now this process's to run; None when none waits.

        Args:
            patience: Seconds to wait, while other processes run what is left, for a trial of one that dies. None then
                says that all trials have ended, or that the time is up (see `unfinished`).
        """
        until = time.monotonic() + patience
        while (trial := self._claimed()) is None:
            remaining = until - time.monotonic()
            if remaining <= 0 or not self.unfinished():
                break
            time.sleep(min(_LOOK_AGAIN, self._lease / 4, remaining))
        return trial

    def finished(self) -> tuple[Finished, ...]:
        """All trials that have ended, whoever ran them, in the order planned."""
        return tuple(slot.finished() for slot in self._slots() if slot.state in ("done", "failed"))

    def unfinished(self) -> tuple[Params, ...]:
        """Parameters of the trials that wait or run, in the order planned; empty for one not drawn yet."""
        return tuple(slot.params for slot in self._slots() if slot.state not in ("done", "failed"))

    def _slots(self) -> list[Slot]:
        return group(self._storage.trials())

    def _plan(self, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        """Make a first attempt for every key that has no slot."""
        known = {slot.key for slot in self._slots()}
        for key, attributes in wanted.items():
            if key not in known:
                self._storage.create("WAITING", {"slot": key, "attempt": 0, **attributes})
        self._tidy()

    def _tidy(self) -> None:
        """End what two processes planned at once and does not count; it would wait for ever."""
        trials = self._storage.trials()
        counted = {attempt.number for slot in group(trials) for attempt in slot.attempts}
        for trial in trials:
            if trial.state.name == "WAITING" and trial.number not in counted:
                self._storage.end(trial._trial_id, "FAIL", {"duplicate": True})

    def _claimed(self) -> Trial | None:
        waiting = [slot for slot in self._recovered() if slot.state == "waiting" and self._can_run(slot)]
        # By number of the attempt's trial: one that killed its process comes after those that were never tried.
        for slot in sorted(waiting, key=lambda slot: slot.last.number):
            key = slot.last._trial_id
            if self._storage.claim(key) and hold(self._storage, key):
                return Trial(self._storage, key, slot.number, self._params(slot), self._lease)
        return None

    def _can_run(self, slot: Slot) -> bool:
        return self._search is not None or "search" not in slot.last.user_attrs

    def _params(self, slot: Slot) -> Params:
        index = slot.last.user_attrs.get("search")
        if self._search is None or index is None:
            return slot.params
        with telling(self._storage.place):
            return self._search.draw(self._storage, slot.last._trial_id, index)

    def _recovered(self) -> list[Slot]:
        """The slots, once the attempts of dead processes are given up and the next ones are planned."""
        slots = self._slots()
        if gone := [slot for slot in slots if slot.abandoned(self._lease)]:
            for slot in gone:
                self._storage.end(slot.last._trial_id, "FAIL", {"abandoned": True})
            slots = self._slots()
        if lapsed := [slot for slot in slots if slot.state == "lapsed"]:
            for slot in lapsed:
                self._try_again(slot)
            self._tidy()
            slots = self._slots()
        return slots

    def _try_again(self, slot: Slot) -> None:
        carried = {
            name: value for name, value in slot.last.user_attrs.items() if name in ("params", "search")
        }
        again = {"slot": slot.key, "attempt": len(slot.attempts), **carried}
        self._storage.create("WAITING", again, drawn=slot.last.params)

    def _agree(self, name: str, document: Mapping[str, Any]) -> None:
        """Keep a document under a name, unless another process did: then it must be the same."""
        mine = json.loads(json.dumps(document))
        if self._kept(name) is None:
            # The first of those that several processes keep at once is the one that counts.
            self._storage.create("FAIL", {"kept": name, **pieces.split("document", mine)})
        theirs = self._kept(name)
        if theirs != mine:
            key, there, here = _difference(theirs, mine)
            raise InputError(
                f"the study {self._storage.name!r} in {self._storage.place} is another: its {key} is {there}, "
                f"here it is {here}; choose another output folder, or remove that one"
            )

    def _kept(self, name: str) -> Any:
        for trial in self._storage.trials():
            if trial.user_attrs.get("kept") == name:
                return pieces.joined("document", trial.user_attrs)
        return None


def _difference(there: Any, here: Any, path: str = "") -> tuple[str, str, str]:
    """Where two documents differ first: the key, with dots into what it holds, and both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            if key not in here or key not in there or here[key] != there[key]:
                inner = f"{path}.{key}" if path else key
                return _difference(there.get(key), here.get(key), inner)
    return path, _short(there), _short(here)


def _short(value: Any) -> str:
    text = json.dumps(value) if value is not None else "not given"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
