"""Is the first checkpoint the base and the second the aligned one?

Swapped, the edit would remove alignment and look like success. Two kinds of evidence stand in the files: the
model cards' `base_model`, and a chat template, which alignment adds and does not take away.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import InputError
from surgery.hub import Source

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Roles:
    """Evidence for and against the order BASE, ALIGNED, as sentences."""

    supports: tuple[str, ...]
    contradicts: tuple[str, ...]

    def summary(self) -> str:
        """One line on what the order rests on."""
        if self.contradicts:
            return "contradicted: " + "; ".join(self.contradicts)
        return "; ".join(self.supports) or "no evidence in the files for which is which"


def card_metadata(folder: Path) -> dict[str, Any]:
    """The YAML front matter of a model card, empty where there is none that can be read."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8-sig")
        found = _FRONT_MATTER.match(text)
        parsed = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def parents(folder: Path) -> tuple[str, ...]:
    """What a card's `base_model` names."""
    named = card_metadata(folder).get("base_model")
    return tuple(str(name) for name in (named if isinstance(named, list) else [named] if named else []))


def has_chat_template(folder: Path) -> bool:
    """Whether a chat template lies in the folder, in any of the places transformers reads."""
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    if list((folder / "additional_chat_templates").glob("*.jinja")):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _names(source: Source, named: str) -> bool:
    """Whether a card's `base_model` entry means this source.

    A repository is compared whole; a local folder by its last component, since where it lies says nothing.
    """
    if source.repository:
        return named.casefold() == source.repository.casefold()
    return named.rpartition("/")[2].casefold() == source.label.rpartition("/")[2].casefold()


def evidence(base: Source, aligned: Source) -> Roles:
    """What the files say on the order of the two."""
    supports, contradicts = [], []
    if any(_names(base, named) for named in parents(aligned.folder)):
        supports.append(f"the card of {aligned.label} names {base.label} as its base_model")
    if any(_names(aligned, named) for named in parents(base.folder)):
        contradicts.append(f"the card of {base.label} names {aligned.label} as its base_model")
    templates = has_chat_template(base.folder), has_chat_template(aligned.folder)
    if templates == (False, True):
        supports.append(f"only {aligned.label} has a chat template")
    if templates == (True, False):
        contradicts.append(f"only {base.label} has a chat template")
    return Roles(tuple(supports), tuple(contradicts))


def check_order(base: Source, aligned: Source, *, i_checked_the_order: bool) -> Roles:
    """Evidence on the order of the two.

    Raises:
        InputError: It contradicts the order given, and nobody has vouched for it.
    """
    roles = evidence(base, aligned)
    if roles.contradicts and not i_checked_the_order:
        raise InputError(
            f"base {base.label} and aligned {aligned.label} look swapped: {'; '.join(roles.contradicts)}; "
            "swap the two, or add --i-checked-the-order if this order is right"
        )
    return roles
