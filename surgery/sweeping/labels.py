"""What a sweep's trials are called in tables and plots."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

_LOX = ("rank", "alpha", "anchor")
_MISSING = object()


def label(params: Mapping[str, Any], told: Collection[str] = ()) -> str:
    """A trial in few words: `r6 a1.5`, `rho 2, steps 40`.

    Args:
        params: Of the trial.
        told: Names that are left out, as their values are told elsewhere; not those of `r6 a1.5`.
    """
    is_lox = params.keys() >= set(_LOX)
    head = []
    if is_lox:
        anchor = "" if params["anchor"] == "aligned" else f" {params['anchor']}"
        head = [f"r{params['rank']} a{params['alpha']:g}{anchor}"]
    rest = (name for name in params if name not in told and not (is_lox and name in _LOX))
    return ", ".join([*head, *(f"{name} {_short(params[name])}" for name in rest)]) or "as it is"


def common(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that have one value in all trials of two or more, but for rank, alpha and anchor of LoX.

    Args:
        trials: The parameters of each.
    """
    if len(trials) < 2:
        return {}
    first, *others = trials
    kept = _LOX if first.keys() >= set(_LOX) else ()
    return {
        name: value
        for name, value in first.items()
        if name not in kept and all(one.get(name, _MISSING) == value for one in others)
    }


def labels(trials: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """What each trial is called, without what all of them have in common; and that, in words."""
    same = common(trials)
    return [label(params, same) for params in trials], label(same) if same else ""


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
