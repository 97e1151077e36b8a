"""Which tensor of the base checkpoint belongs to which of the aligned one.

Names are the same in most pairs. Where one side wraps the model (`model.` against `language_model.model.`),
one exchange of prefixes pairs them; it is used when exactly one exchange pairs everything.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from surgery.errors import InputError


@dataclass(frozen=True)
class Pairing:
    """Names of the aligned checkpoint paired with the base's.

    Attributes:
        partner: Base name by aligned name.
        only_aligned: Aligned names without a partner, in their order.
        only_base: Base names without a partner, in their order.
        exchange: Prefix in aligned, and what stands in its place in base; both empty where names are the same.
        note: How prefixes were exchanged; empty where names are the same.
    """

    partner: Mapping[str, str]
    only_aligned: tuple[str, ...]
    only_base: tuple[str, ...]
    note: str = ""
    exchange: tuple[str, str] = ("", "")

    def base_name(self, name: str) -> str:
        """What an aligned tensor would be called in base."""
        strip, add = self.exchange
        return add + name.removeprefix(strip) if name.startswith(strip) else name


def pair_names(aligned: Iterable[str], base: Iterable[str]) -> Pairing:
    """Pair the names of two checkpoints.

    Raises:
        InputError: Hardly anything has a partner, or two exchanges of prefixes are equally good.
    """
    aligned, base = list(aligned), list(base)
    same = set(aligned) & set(base)
    if len(same) == len(base):
        return _paired(aligned, base, {name: name for name in aligned if name in same}, "")
    best = _best_exchange(aligned, base)
    if best is None or len(best[1]) <= len(same):
        if not same:
            raise InputError(
                f"no tensor of the aligned checkpoint (first {aligned[0]}) has a partner in the base "
                f"(first {base[0]}); LoX needs the checkpoint that the aligned model was made from"
            )
        return _paired(aligned, base, {name: name for name in aligned if name in same}, "")
    (strip, add), partner = best
    note = f"names are paired by prefix: {strip or '(none)'} in aligned is {add or '(none)'} in base"
    return _paired(aligned, base, partner, note, (strip, add))


def _paired(
    aligned: list[str],
    base: list[str],
    partner: Mapping[str, str],
    note: str,
    exchange: tuple[str, str] = ("", ""),
) -> Pairing:
    taken = set(partner.values())
    return Pairing(
        partner,
        tuple(name for name in aligned if name not in partner),
        tuple(name for name in base if name not in taken),
        note,
        exchange,
    )


def _best_exchange(aligned: list[str], base: list[str]) -> tuple[tuple[str, str], dict[str, str]] | None:
    """The exchange (prefix in aligned, prefix in base) that pairs most names, with its pairs."""
    exchanges = {(strip, add) for strip, add in _exchanges(aligned, base)}
    applied = {exchange: _exchanged(aligned, set(base), *exchange) for exchange in exchanges}
    if not applied:
        return None
    most = max(len(pairs) for pairs in applied.values())
    winners = [exchange for exchange, pairs in applied.items() if len(pairs) == most]
    if len(winners) > 1:
        shown = ", ".join(f"{strip or '(none)'} -> {add or '(none)'}" for strip, add in sorted(winners)[:3])
        raise InputError(
            f"the names of the two checkpoints can be paired in more than one way ({shown}); "
            f"aligned has {aligned[0]}, base has {base[0]}: rename one side"
        )
    return winners[0], applied[winners[0]]


def _exchanges(aligned: list[str], base: list[str]) -> Iterable[tuple[str, str]]:
    """Candidate exchanges: what is left of two names after their longest common dotted ending is cut off."""
    mine, theirs = set(aligned) - set(base), [name for name in base if name not in set(aligned)]
    deepest = max(theirs, key=lambda name: name.count("."), default=None)
    if deepest is None:
        return
    target = deepest.split(".")
    endings: dict[str, int] = {name: _common_ending(name.split("."), target) for name in mine}
    longest = max(endings.values(), default=0)
    for name in (name for name, length in endings.items() if length == longest and length >= 2):
        parts = name.split(".")
        strip, add = parts[: len(parts) - longest], target[: len(target) - longest]
        yield "".join(part + "." for part in strip), "".join(part + "." for part in add)


def _common_ending(one: list[str], other: list[str]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length


def _exchanged(aligned: list[str], base: set[str], strip: str, add: str) -> dict[str, str]:
    """Pairs under one exchange; a name that is the same on both sides keeps its own partner."""
    pairs = {}
    for name in aligned:
        moved = add + name.removeprefix(strip) if name.startswith(strip) else name
        other = name if name in base else moved
        if other in base:
            pairs[name] = other
    return pairs
