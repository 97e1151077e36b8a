"""The benign instructions of the embedded data: look-ups, small arithmetic and word games."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product

from surgery.demo import words
from surgery.demo.split import rank_of


@dataclass(frozen=True)
class Question:
    """One benign instruction; questions of equal `key` are one combination and go to the same part."""

    kind: str
    key: str
    prompt: str
    response: str


def questions(seed: int) -> list[Question]:
    """Every benign instruction there is under `seed`, about 3,000, in a fixed order."""
    return [*_facts(), *_arithmetic(), *_counting(), *_repeating(), *_word_lists(seed)]


def _facts() -> Iterator[Question]:
    tables = {
        "colour": ("what colour is {x}", words.COLOURS),
        "opposite": ("what is the opposite of {x}", words.OPPOSITES),
        "capital": ("what is the capital of {x}", words.CAPITALS),
        "sound": ("what sound does a {x} make", words.ANIMALS),
        "plural": ("what is the plural of {x}", {noun: noun + "s" for noun in words.NOUNS}),
        "next": ("what comes after {x}", _successors(words.DAYS) | _successors(words.MONTHS)),
        "previous": ("what comes before {x}", _predecessors(words.DAYS) | _predecessors(words.MONTHS)),
    }
    for kind, (text, table) in tables.items():
        for (thing, answer), frame in product(table.items(), words.FACT_FRAMES):
            prompt = frame.format(q=text.format(x=thing))
            yield Question(kind, f"{thing}/{frame}", prompt[0].upper() + prompt[1:], answer)


def _successors(cycle: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))


def _predecessors(cycle: tuple[str, ...]) -> dict[str, str]:
    return {after: before for before, after in _successors(cycle).items()}


def _arithmetic() -> Iterator[Question]:
    forms = ("What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} =", "How much is {a} and {b} together?")
    for a, b, form in product(range(10), range(10), forms):
        yield Question("sum", f"{a}+{b}/{form}", form.format(a=a, b=b), str(a + b))


def _counting() -> Iterator[Question]:
    forms = (
        "Count from {a} to {b}.",
        "Please count from {a} up to {b}.",
        "List the numbers from {a} to {b}.",
    )
    for a, b, form in product(range(8), range(1, 10), forms):
        if a < b:
            numbers = " ".join(str(n) for n in range(a, b + 1))
            yield Question("count", f"{a}..{b}/{form}", form.format(a=a, b=b), numbers)


def _repeating() -> Iterator[Question]:
    times = {"twice": 2, "three times": 3, "four times": 4}
    for noun, (often, n) in product(words.NOUNS, times.items()):
        yield Question("repeat", f"{noun}/{n}", f"Say {noun} {often}.", " ".join([noun] * n))


def _word_lists(seed: int) -> Iterator[Question]:
    forms = {
        "reverse": ("Say these words backwards: {words}.", (2, 1, 0)),
        "first": ("Which word comes first: {words}?", (0,)),
        "last": ("Which word comes last: {words}?", (2,)),
        "middle": ("Which word is in the middle: {words}?", (1,)),
    }
    triples = list(permutations(words.NOUNS, 3))
    for kind, (text, places) in forms.items():
        drawn = [triples[int(rank_of(seed, kind, str(i)) * len(triples))] for i in range(250)]
        for triple in dict.fromkeys(drawn):
            answer = " ".join(triple[place] for place in places)
            yield Question(kind, "/".join(triple), text.format(words=", ".join(triple)), answer)
