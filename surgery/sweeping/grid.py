"""The trials of a sweep of LoX: every combination of ranks, alphas and anchors, as the command spells them."""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Annotated, Any, get_args

from annotated_doc import Doc

from surgery.errors import UsageError
from surgery.methods.base import Anchor
from surgery.methods.lox import LoX

Params = dict[str, Any]
"""`rank`, `alpha` and `anchor` of a trial, and fields that choose tensors."""

CHOOSING = ("edit", "include", "exclude", "layers", "depth")
"""Fields of LoX that a sweep may vary beside those: which tensors are edited. The others change the decomposition."""

# Values of one range at most: more is a slip of the pen.
_MOST = 10_000
# Powers of ten that a number may have: beyond them a float has no use for it.
_EXPONENTS = 300


@dataclass(frozen=True)
class Grid:
    """What a sweep tries."""

    rank: Annotated[str, Doc("Ranks: a list as 1,3,6,auto,full, ranges FROM:TO:STEP with both ends.")] = (
        "1,3,6,12"
    )
    alpha: Annotated[str, Doc("Alphas: a list, or ranges FROM:TO:STEP with both ends.")] = "0.5:2:0.5"
    anchor: Annotated[str, Doc("Anchors: aligned, base, or both.")] = "aligned"

    def trials(self, method: LoX = LoX()) -> list[Params]:  # noqa: B008 - frozen
        """The parameters of every trial, ranks outermost.

        Args:
            method: Everything else about the edit.

        Raises:
            UsageError: One is no number, or none that LoX allows.
        """
        anchors = _words(self.anchor, "anchor")
        if strange := [anchor for anchor in anchors if anchor not in get_args(Anchor)]:
            raise UsageError(f"anchor has {strange[0]!r}; it must be aligned, base or both, as aligned,base")
        every = [
            {"rank": rank, "alpha": alpha, "anchor": anchor}
            for rank, alpha, anchor in itertools.product(self._ranks(), self._alphas(), anchors)
        ]
        for params in every:
            lox(method, params)
        return every

    def largest(self) -> int | None:
        """The largest rank with a number; None where there is none."""
        return max((rank for rank in self._ranks() if isinstance(rank, int)), default=None)

    def _ranks(self) -> list[int | str]:
        found: list[int | str] = []
        for word in _words(self.rank, "rank"):
            if word in ("auto", "full"):
                found.append(word)
                continue
            values = _values(word, "rank", "1,3,6,full")
            if any(value.denominator != 1 for value in values):
                raise UsageError(
                    f"rank has {word!r}; it must be whole numbers, auto or full, as in --rank 1,3,6"
                )
            found += map(int, values)
        return list(dict.fromkeys(found))

    def _alphas(self) -> list[float]:
        return numbers(self.alpha, "alpha", "0.5:2:0.25")


def numbers(text: str, option: str, example: str) -> list[float]:
    """The numbers of a list and of ranges FROM:TO:STEP with both ends, each once.

    Args:
        text: As the command spells it.
        option: Which, for errors.
        example: Of how to spell it.

    Raises:
        UsageError: It is no such list.
    """
    values = (value for word in _words(text, option) for value in _values(word, option, example))
    return list(dict.fromkeys(map(float, values)))


def lox(method: LoX, params: Mapping[str, Any]) -> LoX:
    """The edit of a trial, such as `surgery lox` makes it.

    Args:
        method: Everything else about the edit.
        params: Of the trial.

    Raises:
        UsageError: LoX does not allow them.
    """
    return dataclasses.replace(
        method,
        rank=params["rank"],
        alpha=float(params["alpha"]),
        anchor=params["anchor"],
        **{name: params[name] for name in CHOOSING if name in params},
    )


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError(f"{option} is empty; name at least one")
    return list(dict.fromkeys(words))


def _values(word: str, option: str, example: str) -> list[Fraction]:
    """A number, or the numbers of a range with both ends, exactly as they are spelt."""
    parts = [_number(part) for part in word.split(":")]
    if None in parts or len(parts) not in (1, 3):
        raise UsageError(
            f"{option} has {word!r}; it must be a number or FROM:TO:STEP, as in --{option} {example}"
        )
    known = [part for part in parts if part is not None]
    if len(known) == 1:
        return known
    start, stop, step = known
    if step <= 0 or stop < start:
        raise UsageError(
            f"{option} has {word!r}; FROM must not be above TO, and STEP must be above 0, as in 0.5:2:0.25"
        )
    count = (stop - start) // step + 1
    if count > _MOST:
        raise UsageError(f"{option} has {word!r}, which is {count} values; {_MOST} is the most of one range")
    return [start + number * step for number in range(count)]


def _number(text: str) -> Fraction | None:
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        return None
    if not value.is_finite() or abs(value.adjusted()) > _EXPONENTS:
        return None
    return Fraction(value)
