"""What is done to the aligned model, or in its place to the base, row by row.

Words of a command in braces stand for models: `{base}` and `{aligned}` are the ground's, `{vaccine}` is what the row
`vaccine` made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

CHOSEN = "chosen by the search"
"""In place of options: those of the search's best trial."""

NONE, SFT, ANEW = "none", "sft", "anew"
"""Rows that others are held against: nothing done, plain training on the defender's rows, and that from the base."""


@dataclass(frozen=True)
class Row:
    """One line of the tables.

    Attributes:
        name: Of its folder and of its entry in the ledger.
        title: As the page names it.
        command: The method and the models it takes; empty where nothing is done.
        options: Of the edit; `CHOSEN` alone where a search finds them. Those of training are the ground's.
        on: The row whose output it starts from, if it is not the aligned model.
        claim: Against what the method's paper defends, in few words.
        beside: The row that its steps to break are held against.
    """

    name: str
    title: str
    command: Sequence[str] = ()
    options: Sequence[str] = ()
    on: str | None = None
    claim: str = ""
    beside: str = NONE

    @property
    def method(self) -> str:
        """What `surgery` is called with; empty where nothing is done."""
        return self.command[0] if self.command else ""


def _lox(anchor: str, alpha: str) -> Row:
    options = ("--rank", "6", "--alpha", alpha, "--anchor", anchor)
    return Row(
        f"lox-{anchor}-{alpha}",
        f"LoX, rank 6, alpha {alpha}, {anchor} anchor",
        ("lox", "{base}", "{aligned}"),
        options,
        claim="fine-tuning",
    )


def _trained(name: str, title: str, claim: str) -> Row:
    return Row(name, title, (name, "{aligned}"), claim=claim)


def _from_the_base(name: str, title: str) -> Row:
    """As the method's paper has it: it is the alignment, and begins with the base."""
    return Row(
        f"{name}-anew",
        f"{title} as the alignment of the base",
        (name, "{base}"),
        claim="fine-tuning",
        beside=ANEW,
    )


def _lox_on(name: str, title: str) -> Row:
    return Row(
        f"{name}+lox",
        f"LoX, rank 6, alpha 1.5, on {title}",
        ("lox", "{base}", f"{{{name}}}"),
        ("--rank", "6", "--alpha", "1.5"),
        on=name,
        claim="fine-tuning",
    )


REROUTED = ("circuit-breakers", "circuit-breakers-sparing")
"""Circuit Breakers as it is, and with innocent inputs spared."""

CONDITIONED = ("condition-number-200", "condition-number")
"""Condition Number as its default was, and as it is."""

ROWS: tuple[Row, ...] = (
    Row(NONE, "No defence"),
    Row(SFT, "Plain fine-tuning (control)", ("sft", "{aligned}"), claim="nothing"),
    _lox("aligned", "1.5"),
    _lox("base", "1.5"),
    _lox("aligned", "1.25"),
    _lox("base", "1.25"),
    Row(
        "lox-best", "LoX, best of the search", ("lox", "{base}", "{aligned}"), (CHOSEN,), claim="fine-tuning"
    ),
    _trained("vaccine", "Vaccine", "fine-tuning"),
    _trained("t-vaccine", "T-Vaccine", "fine-tuning"),
    _trained("booster", "Booster", "fine-tuning"),
    _trained("circuit-breakers", "Circuit Breakers", "prompts"),
    Row(
        "circuit-breakers-sparing",
        "Circuit Breakers that spare innocent inputs",
        ("circuit-breakers", "{aligned}"),
        claim="prompts",
    ),
    _trained("condition-number", "Condition Number", "fine-tuning"),
    Row(
        "condition-number-200",
        "Condition Number, lam_well 200 (its former default)",
        ("condition-number", "{aligned}"),
        claim="fine-tuning",
    ),
    _lox_on("vaccine", "Vaccine"),
    _lox_on("circuit-breakers", "Circuit Breakers"),
    Row(
        "circuit-breakers+lox-best",
        "LoX, best of its own search, on Circuit Breakers",
        ("lox", "{base}", "{circuit-breakers}"),
        (CHOSEN,),
        on="circuit-breakers",
        claim="fine-tuning",
    ),
    _trained("mlac", "MLAC (bounded)", "fine-tuning"),
    _trained("tar", "TAR", "fine-tuning"),
    Row(ANEW, "Plain alignment of the base (control)", ("sft", "{base}"), claim="nothing"),
    _from_the_base("vaccine", "Vaccine"),
    _from_the_base("t-vaccine", "T-Vaccine"),
)
"""In the order in which they are run: what is cheap and what others start from comes first."""


def named(name: str) -> Row:
    """The row of this name.

    Raises:
        KeyError: There is none.
    """
    found = {row.name: row for row in ROWS}
    if name not in found:
        raise KeyError(f"no row {name}; there are {', '.join(found)}")
    return found[name]
