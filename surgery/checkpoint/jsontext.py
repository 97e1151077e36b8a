"""JSON from untrusted files: every defect is one InputError, never another exception."""

import json
import re
from collections.abc import Sequence
from typing import Any

from surgery.checkpoint.reading import shown
from surgery.errors import InputError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice)} stands there twice")
    return found


def _integer(digits: str) -> int:
    # JSON readers disagree on -0: to some it is a float.
    if digits == "-0":
        raise ValueError("-0 is no whole number")
    return int(digits)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _check_unicode(text: str, value: Any) -> None:
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()


def _parse(data: bytes, *, strict: bool) -> Any:
    text = data.decode()
    if not strict:
        return json.loads(text)
    value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_constant)
    _check_unicode(text, value)
    return value


def json_object(data: bytes, label: str, *, strict: bool = True) -> dict[str, Any]:
    """The object that UTF-8 JSON holds.

    Args:
        data: The text.
        label: What it is, for messages.
        strict: Refuse what readers disagree on: repeated keys, `NaN`, half surrogate pairs, `-0`.

    Raises:
        InputError: It is not UTF-8, not JSON, nested too deeply, or no object.
    """
    try:
        value = _parse(data, strict=strict)
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise InputError(f"{label} is not UTF-8 ({error.reason}); download it again") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{label} is not JSON ({error.msg} at character {error.pos}); download it again"
        ) from error
    except ValueError as error:
        raise InputError(f"{label} is not usable JSON ({shown(str(error))}); download it again") from error
    except RecursionError as error:
        raise InputError(
            f"{label} is nested too deeply, which no checkpoint needs; do not trust it"
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f"{label} holds a JSON {type(value).__name__}, and an object is needed; download it again"
        )
    return value
