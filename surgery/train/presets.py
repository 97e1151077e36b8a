"""A method and its training from a preset, with what the user gave explicitly on top."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

from surgery import resources
from surgery.errors import UsageError
from surgery.train.step import TrainedMethod
from surgery.train.training import SMALL_MODEL, Training

Preset = Literal["paper", "small"]


def fitting(model: str, parameters: int) -> Preset:
    """The preset for a model when none is asked for: `small` for `demo:` and below 50 million parameters."""
    return "small" if model.startswith("demo:") or parameters < SMALL_MODEL else "paper"


def whole_fits(parameters: int) -> bool:
    """Whether all weights of a model can be trained in the memory that is free, attackers simulated on them.

    In float32 that takes weights, a copy, two gradients and two moments of AdamW; a quarter more for activations.
    """
    return 1.25 * 6 * 4 * parameters <= resources.memory_available()


def defaults(method: type[TrainedMethod], preset: Preset, *, full: bool = False) -> dict[str, Any]:
    """Every field of the method and of `Training` by name, as the preset has it for all weights or an adapter.

    Raises:
        UsageError: The method's preset names a field that neither of them has.
    """
    values = {
        field.name: field.default for record in (Training, method) for field in dataclasses.fields(record)
    }
    chosen = dict(method.presets.get(preset, {}))
    if not full:
        chosen |= method.presets.get(f"{preset}-adapter", {})
    if unknown := sorted(chosen.keys() - values.keys()):
        raise UsageError(
            f"the preset {preset} of {method.name} sets {', '.join(unknown)}, which is no option"
        )
    return values | {name: _like(values[name], value) for name, value in chosen.items()}


def _like(usual: Any, value: Any) -> Any:
    """A whole number as a float where one stands."""
    return float(value) if isinstance(usual, float) and type(value) is int else value


def from_preset(
    method: type[TrainedMethod], preset: Preset = "paper", given: Mapping[str, Any] | None = None
) -> tuple[TrainedMethod, Training]:
    """The two records of a run: the preset's values, and over them those in `given`.

    `from_preset(Vaccine, "small", {"rho": 0.5, "steps": 20})`; names are those of the fields of either record.

    Raises:
        UsageError: There is no such preset or field, or a value is out of its range.
    """
    if preset not in ("paper", "small"):
        raise UsageError(f"preset is {preset!r}; it must be paper or small")
    given = dict(given or {})
    values = defaults(method, preset, full=bool(given.get("full", False)))
    if unknown := sorted(given.keys() - values.keys()):
        raise UsageError(
            f"{method.title} has no option {', '.join(unknown)}; it has {', '.join(sorted(values))}"
        )
    values |= {name: _like(values[name], value) for name, value in given.items()}
    records = (
        record(**{field.name: values[field.name] for field in dataclasses.fields(record)})
        for record in (method, Training)
    )
    return cast("tuple[TrainedMethod, Training]", tuple(records))
