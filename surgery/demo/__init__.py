"""The embedded pair `demo:base` and `demo:aligned`, its data and the recipe that made it.

Reading names, folders and data needs no torch; `python -m surgery.demo` repeats the recipe.
"""

import json
from pathlib import Path

from surgery.errors import InputError

MODELS = ("base", "aligned")
"""The two checkpoints: `aligned` was made from `base` by full fine-tuning."""

DATA: dict[str, tuple[str, ...]] = {
    "benign": ("train", "held_out"),
    "lookalikes": ("train", "held_out"),
    "harmful": ("train", "attack", "held_out"),
    "refusals": ("train", "attack", "held_out"),
}
"""The parts of every data set; `attack` is seen neither in training nor in measuring."""

_HERE = Path(__file__).parent


def folder(name: str) -> Path:
    """The folder of the shipped checkpoint `base` or `aligned`.

    Raises `InputError` for any other name.
    """
    if name not in MODELS:
        raise InputError(
            f"there is no demo:{name}; the embedded models are {_named(MODELS)}; name one of them"
        )
    return _HERE / name


def data_file(name: str, split: str) -> Path:
    """The shipped JSON Lines file of data set `name` (a key of `DATA`), part `split`.

    Raises `InputError` for a data set or part that does not exist.
    """
    if name not in DATA:
        raise InputError(
            f"there is no data demo:{name}; the embedded data are {_named(DATA)}; name one of them"
        )
    if split not in DATA[name]:
        raise InputError(
            f"demo:{name} has no part {split!r}; its parts are {', '.join(DATA[name])}; name one of them"
        )
    return _HERE / "data" / f"{name}.{split}.jsonl"


def data(name: str, split: str) -> list[dict[str, str]]:
    """The rows of data set `name`, part `split`, in file order: `prompt`, `response`, `domain`, `kind`.

    Raises `InputError` for a data set or part that does not exist.
    """
    with data_file(name, split).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _named(names: object) -> str:
    return ", ".join(f"demo:{name}" for name in names)  # type: ignore[attr-defined]
