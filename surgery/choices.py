"""Records refuse what their types do not allow, whether a command or a program made them."""

import dataclasses
import math
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from surgery.errors import UsageError

NEGATABLE = "negatable"
"""Mark in the annotation of a switch that may be on by itself, so that it has to have a form that turns it off."""


def require_choices(record: Any) -> None:
    """Refuse a record with a value that its field's type does not list.

    Raises:
        UsageError: Naming the field and what it may be.
    """
    hints = get_type_hints(type(record), include_extras=True)
    for field in dataclasses.fields(record):
        value, kind = getattr(record, field.name), hints[field.name]
        if not _allowed(value, kind):
            raise UsageError(f"{field.name.replace('_', '-')} is {value!r}; it must be {_spelled(kind)}")


def _plain(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _allowed(value: Any, kind: Any) -> bool:
    kind = _plain(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return any(_allowed(value, member) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


def _spelled(kind: Any) -> str:
    kind = _plain(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_spelled(member) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    return (
        "nothing" if kind is types.NoneType else {int: "a whole number", str: "text"}.get(kind, kind.__name__)
    )


def require_weights(record: Any, *names: str) -> None:
    """Refuse a record in which one of these fields is negative, infinite or no number.

    Raises:
        UsageError: Naming the field.
    """
    for name in names:
        value = getattr(record, name)
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name.replace('_', '-')} is {value}; it must be a finite number of at least 0")


def whole_numbers(text: str, option: str) -> list[int]:
    """The numbers that a list such as 10,20 names, ascending, each once, all at least 1.

    Raises:
        UsageError: It is no such list.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} is {text!r}; it must be numbers of at least 1, as in --{option} 10,20")
    return sorted({int(part) for part in parts})
