"""All attacks of a budget as one study: any number of processes share its trials, and a killed one goes on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from surgery import allocator
from surgery.attacking import curves, trials
from surgery.attacking.ground import Ground
from surgery.attacking.settings import Budget, record, taken
from surgery.attacks.base import Attack
from surgery.errors import InputError, Interrupted, SurgeryError, UsageError
from surgery.inputs import checkpoint_fingerprint
from surgery.studying import Study, Trial

# Seconds for which trials that other processes run are waited for.
_PATIENCE = 3600.0

Progress = Callable[[int, int, str], None]
"""Called after each trial with trials done, trials in all, and what came of it in one line."""


@allocator.freed_kept()
def run(
    ground: Ground,
    budget: Budget,
    folder: Path,
    *,
    seed: int = 0,
    storage: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the trials that no other process has run, wait for theirs, and return what all of them came to.

    Args:
        ground: Where the attacks take place.
        budget: What the attacker may try.
        folder: Where the study's journal is.
        seed: Of a search.
        storage: The URL of a database to share in place of the journal, as `postgresql://...`.
        progress: Called after each trial of this process.

    Raises:
        InputError: The study there is of other inputs, or every trial failed.
    """
    chosen = chosen_on(ground, budget)
    folder.mkdir(parents=True, exist_ok=True)
    studies = _studies(ground, budget, chosen, storage or folder, seed)
    total = sum(count for _, _, count in studies)
    at_rest: list[trials.Point] = []
    done = 0
    for study, fixed, _ in studies:
        while (trial := study.claim(patience=_PATIENCE)) is not None:
            line = _one(trial, {**fixed, **trial.params}, ground, budget, at_rest)
            done += 1
            if progress is not None:
                progress(done, total, line)
    found = [_documents(study, fixed) for study, fixed, _ in studies]
    finished = [trial for good, _ in found for trial in good]
    failed = [trial for _, bad in found for trial in bad]
    numbered = [{"number": number, **trial} for number, trial in enumerate(finished)]
    if not [trial for trial in numbered if trial["params"]["attack"] != curves.UNATTACKED] and chosen:
        raise InputError(f"every trial failed, the first with: {failed[0]['error']}")
    return curves.document(ground.document(), numbered, failed, budget.threshold)


def _known(ground: Ground) -> dict[str, Any]:
    """What attackers have, by the names that attacks ask for it."""
    return {**ground.target.data, "base": ground.target.base}


def chosen_on(ground: Ground, budget: Budget) -> list[type[Attack]]:
    """The attacks that a budget asks for.

    Raises:
        UsageError: There is no such attack, or the attacker lacks what one needs.
    """
    known = _known(ground)
    chosen = [attack for attack in budget.chosen(known) if attack.name != curves.UNATTACKED]
    for attack in chosen:
        if missing := [need for need in attack.needs if not known.get(need)]:
            option = "--base" if missing[0] == "base" else f"--{missing[0]}-data"
            raise UsageError(f"{attack.title} needs {missing[0]}; give {option}, or leave {attack.name} out")
    return chosen


def _studies(
    ground: Ground, budget: Budget, chosen: Sequence[type[Attack]], storage: str | Path, seed: int
) -> list[tuple[Study, dict[str, Any], int]]:
    """The grid of all attacks as one study, and each search as one of its own.

    With each goes what is the same in all its trials, and how many of them there are.
    """
    identity = {
        "checkpoint": checkpoint_fingerprint(ground.checkpoint, ground.source),
        **ground.document(),
        "budget": {
            key: value
            for key, value in asdict(budget).items()
            if key not in ("attacks", "learning_rates", "kinds", "seeds", "threshold")
        },
    }
    grid = Study.open(storage, "attacks", identity=identity)
    planned = [{"attack": curves.UNATTACKED}, *budget.trials(chosen)]
    grid.add(planned)
    studies: list[tuple[Study, dict[str, Any], int]] = [(grid, {}, len(planned))]
    for attack in chosen if budget.search else ():
        if attack.trains:
            study = Study.open(storage, f"search {attack.name}", identity={**identity, "seed": seed})
            study.search(budget.space(attack), budget.search, seed)
            fixed = {"attack": attack.name, **taken(attack, budget.course())}
            studies.append((study, fixed, budget.search))
    return studies


def _one(
    trial: Trial, params: Mapping[str, Any], ground: Ground, budget: Budget, at_rest: list[trials.Point]
) -> str:
    """Run a trial and put its result into the study; what came of it, in one line."""
    said = ", ".join(f"{key} {value}" for key, value in params.items() if key in ("kind", "lr", "seed"))
    name = f"{params['attack']} {said}".rstrip()
    try:
        found = trials.run(
            record(params),
            ground,
            until_settled=budget.until_settled,
            save_generations=budget.save_generations,
            at_rest=at_rest,
        )
    except Interrupted:
        # No fault of the trial: whoever claims it next runs it.
        trial.give_back()
        raise
    except SurgeryError as error:
        trial.fail(str(error))
        return f"{name}: failed, {error}"
    best = curves.worst([{"number": 0, "params": params, **found}], ground.rate)
    value = best[ground.rate]["value"] if best[ground.rate] else None
    trial.finish(found, [value if value is not None else 0.0])
    return f"{name}: {ground.rate} {value if value is None else round(value, 3)} at {best['steps']} steps"


def _documents(study: Study, fixed: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Trials that came to something, and those that failed."""
    good: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    for one in study.finished():
        if one.result is not None:
            good.append({"params": {**fixed, **one.params}, **one.result})
        else:
            bad.append({"params": {**fixed, **one.params}, "error": one.error})
    return good, bad
