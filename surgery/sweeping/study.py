"""Trials on one model in memory: put it into a trial's state, measure it, keep what came of it in a study."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from surgery import allocator
from surgery.errors import Interrupted, SurgeryError
from surgery.scores import Censored, Score, from_document

# Seconds for which trials that other processes run are waited for.
_PATIENCE = 3600.0

Params = Mapping[str, str | int | float | bool | None]
_P = TypeVar("_P", bound=Params)

Scores = Mapping[str, Score | Censored]
"""What was measured, by name."""

Measure = Callable[[nn.Module], Scores]
"""Looks at a model and leaves it as it was."""

State = Callable[[Any], AbstractContextManager[Mapping[str, Any]]]
"""Puts the model into the state that a trial's parameters say, inside a with-block; yields figures of that state."""

Progress = Callable[[int, int, "Measured"], None]
"""Called after each trial of this process with how many it did, how many were asked for, and what came of it."""


@runtime_checkable
class Trial(Protocol):
    """A claimed trial, such as `surgery.studying` has."""

    @property
    def params(self) -> Params:
        """What is tried."""

    def finish(self, result: Mapping[str, Any], values: Sequence[float] = ()) -> None:
        """Keep its result."""

    def fail(self, reason: str) -> None:
        """Keep why it has none."""

    def give_back(self) -> None:
        """Let whoever claims it next run it."""


@runtime_checkable
class Finished(Protocol):
    """A trial that has ended, whoever ran it."""

    @property
    def params(self) -> Params:
        """What was tried."""

    @property
    def result(self) -> Mapping[str, Any] | None:
        """None where it failed."""

    @property
    def error(self) -> str | None:
        """Why it failed."""


@runtime_checkable
class Study(Protocol):
    """Where trials are planned, claimed and kept, by any number of processes."""

    def add(self, params_list: Sequence[Params]) -> Any:
        """Plan trials that are not planned yet."""

    def claim(self, patience: float = 0.0) -> Any:
        """The next waiting trial; None where none has come to wait for so many seconds, or all have ended."""

    def finished(self) -> Sequence[Any]:
        """All that ended."""


@dataclass(frozen=True)
class Measured:
    """A trial that has ended.

    Attributes:
        params: What was tried.
        scores: What was measured; empty where it failed.
        figures: Of the state it was measured in.
        error: Why it failed.
    """

    params: Params
    scores: Scores
    figures: Mapping[str, Any]
    error: str | None = None

    def document(self) -> dict[str, Any]:
        """The trial as JSON has it."""
        failed = {"error": self.error} if self.error is not None else {}
        return {"params": dict(self.params), **_result(self.scores, self.figures), **failed}


@allocator.freed_kept()
def run(
    study: Study,
    planned: Sequence[_P],
    model: nn.Module,
    state: State,
    measure: Measure,
    progress: Progress | None = None,
) -> tuple[Measured, ...]:
    """Run the trials that nobody has run, and return all that have ended, in the order planned.

    Trials that other processes run are waited for. One that fails is kept with its reason.

    Args:
        study: Its trials are of this model, this measure and, in a sweep, this largest rank: say so in its identity.
        planned: Parameters of every trial.
        model: What `state` works on.
        state: As it says.
        measure: As it says.
        progress: As it says.
    """
    study.add(planned)
    done = 0
    while (trial := study.claim(patience=_PATIENCE)) is not None:
        measured = _one(trial, model, state, measure)
        done += 1
        if progress is not None:
            progress(done, len(planned), measured)
    ended = {_key(one.params): one for one in study.finished()}
    return tuple(_measured(ended[key]) for params in planned if (key := _key(params)) in ended)


def _one(trial: Trial, model: nn.Module, state: State, measure: Measure) -> Measured:
    try:
        with state(trial.params) as figures:
            scores = dict(measure(model))
    except Interrupted:
        # No fault of the trial: whoever claims it next runs it.
        trial.give_back()
        raise
    except SurgeryError as error:
        trial.fail(str(error))
        return Measured(trial.params, {}, {}, str(error))
    trial.finish(_result(scores, figures))
    return Measured(trial.params, scores, figures)


def _result(scores: Scores, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"scores": {name: score.document() for name, score in scores.items()}, "figures": dict(figures)}


def _measured(ended: Finished) -> Measured:
    if ended.result is None:
        return Measured(ended.params, {}, {}, ended.error or "failed")
    scores = {name: from_document(known) for name, known in ended.result["scores"].items()}
    return Measured(ended.params, scores, ended.result["figures"])


def _key(params: Params) -> str:
    return json.dumps(dict(params), sort_keys=True)


def successful(trials: Iterable[Measured]) -> list[Measured]:
    """Those that did not fail."""
    return [trial for trial in trials if trial.error is None]
