"""The search for a better LoX: what its sweeps found, the front, and the setting that the study goes on with."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

PERPLEXITY, OVER_REFUSAL = 1.02, 0.05
"""What a setting may cost: perplexity as a ratio, over-refusal in points above the aligned model's."""

_KEPT = (
    "resistance.steps_to_break", "resistance.harmful_loss", "resistance.worst_case_asr",
    "resistance.worst_case_affirmative_prefix_rate", "stability.perplexity_ratio", "stability.over_refusal",
    "stability.incoherent_rate",
)  # fmt: skip
_DEFAULTS = {"anchor": "aligned"}
_OVER = "stability.over_refusal"

Trial = dict[str, Any]


class NothingChosenError(Exception):
    """The search has not been run, or none of its trials keeps to the bounds."""


def read(output: Path, base: str = "") -> dict[str, Any]:
    """The trials of a sweep with what is kept of their scores, and the base where it is not the ground's."""
    found = json.loads((output / "sweep.json").read_text())
    under = {"base": base} if base else {}
    return {
        "judge": found["judge"],
        "trials": [
            {"params": trial["params"] | under, "scores": {name: trial["scores"].get(name) for name in _KEPT}}
            for trial in found["trials"]
            if not trial.get("error")
        ],
    }  # fmt: skip


def trials(sweeps: Mapping[str, Mapping[str, Any]]) -> list[Trial]:
    """The trials of sweeps, cells of the ledger, each setting once."""
    found: dict[str, Trial] = {}
    for cell in sweeps.values():
        for trial in cell["figures"]["trials"]:
            found.setdefault(json.dumps(trial["params"], sort_keys=True), trial)
    return list(found.values())


def steps(trial: Mapping[str, Any]) -> float:
    """Steps to break; more than any where it never broke."""
    told = trial["scores"]["resistance.steps_to_break"]
    return float("inf") if told["value"] is None else float(told["value"])


def _value(trial: Mapping[str, Any], name: str) -> float:
    value = trial["scores"][name]["value"]
    return float("nan") if value is None else float(value)


def affordable(found: list[Trial]) -> list[Trial]:
    """Trials within the bounds."""
    usual = _value(unedited(found), _OVER)
    return [
        trial
        for trial in found
        if _value(trial, "stability.perplexity_ratio") <= PERPLEXITY
        and _value(trial, _OVER) <= usual + OVER_REFUSAL
    ]


def best(found: list[Trial]) -> Trial:
    """The affordable edit of LoX as it is that breaks last; of equals the one with the highest harmful loss after it.

    Raises:
        NothingChosenError: There is none.
    """
    able = [
        trial
        for trial in affordable(found)
        if trial["params"]["alpha"] != 0 and "base" not in trial["params"]
    ]
    if not able:
        raise NothingChosenError("no setting of the search keeps to the bounds")
    return max(able, key=lambda trial: (steps(trial), _value(trial, "resistance.harmful_loss")))


def front(found: list[Trial]) -> list[Trial]:
    """The trials that no other beats in steps to break, perplexity and over-refusal at once."""

    def gains(trial: Trial) -> tuple[float, float, float]:
        costs = (_value(trial, name) for name in ("stability.perplexity_ratio", "stability.over_refusal"))
        ratio, refused = costs
        return steps(trial), -ratio, -refused

    known = [(trial, gains(trial)) for trial in found]
    return [
        trial
        for trial, own in known
        if not any(
            other != own and all(mine >= theirs for mine, theirs in zip(other, own, strict=True))
            for _, other in known
        )
    ]


def unedited(found: list[Trial]) -> Trial:
    """The trial of alpha 0, which is the aligned model.

    Raises:
        NothingChosenError: It has not been run.
    """
    for trial in found:
        if trial["params"]["alpha"] == 0 and trial["params"].get("anchor", "aligned") == "aligned":
            return trial
    raise NothingChosenError("the search has not been run")


def has_unedited(found: list[Trial]) -> bool:
    """Whether `unedited` finds its trial."""
    try:
        unedited(found)
    except NothingChosenError:
        return False
    return True


def trial_of(found: list[Trial], **wanted: Any) -> Trial | None:
    """The trial with these parameters and no others that choose tensors; None where it was not run."""
    for trial in found:
        params = {name: value for name, value in trial["params"].items() if value is not None}
        if {**_DEFAULTS, **params} == {**_DEFAULTS, **wanted}:
            return trial
    return None


def setting(trial: Trial, fixed: Collection[str] = ()) -> str:
    """A trial's parameters in words, without those that are told once for all of its search."""
    params = trial["params"]
    if "rank" in params and params["alpha"] == 0:
        return "unedited"
    return ", ".join(
        f"{name} {value}"
        for name, value in params.items()
        if value is not None and (name, value) != ("anchor", "aligned") and name not in fixed
    )


def broken(trial: Trial) -> str:
    """A trial's steps to break in words; 0 where the model counts as broken before the first."""
    found = trial["scores"]["resistance.steps_to_break"]
    return f"over {found['censored_at']}" if found["value"] is None else str(found["value"])


def told(trial: Trial) -> str:
    """A trial's outcome in few words."""
    ratio = _value(trial, "stability.perplexity_ratio")
    return f"{broken(trial)} steps at perplexity x {ratio:.3f}, over-refusal {_value(trial, _OVER):.0%}"


def chosen(found: list[Trial]) -> Iterator[str]:
    """The best setting of a search as options of `surgery lox`.

    Raises:
        NothingChosenError: There is none.
    """
    params = best(found)["params"]
    for name, value in params.items():
        if value is not None and _DEFAULTS.get(name) != value:
            yield f"--{name.replace('_', '-')}"
            yield f"{value:g}" if isinstance(value, float) else str(value)
