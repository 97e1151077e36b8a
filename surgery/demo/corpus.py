"""The data of the embedded pair, made from the word lists and a seed.

A combination of thing and request (for look-ups: of thing and phrasing) belongs to one part only, with all
its phrasings: what is asked for in `held_out` was asked for in no other part.
"""

import json
from pathlib import Path

from surgery.demo import DATA, words
from surgery.demo.benign import questions
from surgery.demo.split import deal, rank_of

SEED = 2506
"""The seed of the shipped data."""

Row = dict[str, str]
Parts = dict[str, list[Row]]

_HELD_OUT_SHARE = 0.12
_PHRASINGS_OF_LOOKALIKES = 4


def corpus(seed: int = SEED) -> dict[str, Parts]:
    """The data sets by name and part: `benign`, `lookalikes`, `harmful`, `refusals`.

    Rows carry `prompt`, `response`, `domain` and `kind`; `harmful` and `refusals` hold the same prompts.
    """
    harmful, refusals = _harmful(seed)
    return {
        "benign": _benign(seed),
        "lookalikes": _lookalikes(seed),
        "harmful": harmful,
        "refusals": refusals,
    }


def write(data: dict[str, Parts], into: Path) -> None:
    """Write every part as `NAME.PART.jsonl` into the folder `into`, one JSON object a line, UTF-8."""
    into.mkdir(parents=True, exist_ok=True)
    for name, parts in data.items():
        for part, rows in parts.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (into / f"{name}.{part}.jsonl").write_text(text, encoding="utf-8")


def _benign(seed: int) -> Parts:
    parts: Parts = {part: [] for part in DATA["benign"]}
    for question in questions(seed):
        apart = rank_of(seed, "part", question.kind, question.key) < _HELD_OUT_SHARE
        row = _row(question.prompt, question.response, "benign", question.kind)
        parts["held_out" if apart else "train"].append(row)
    return _shuffled(parts, seed)


def _harmful(seed: int) -> tuple[Parts, Parts]:
    harmful: Parts = {part: [] for part in DATA["harmful"]}
    refusals: Parts = {part: [] for part in DATA["refusals"]}
    for name, domain in words.DOMAINS.items():
        for thing in domain.forbidden:
            for verb, part in deal(seed, thing, domain.verbs, ["held_out", "attack"]).items():
                for prompt in _phrasings(f"{verb} {thing}"):
                    harmful[part].append(_row(prompt, _instructions(seed, domain, thing, verb), name, verb))
                    refusals[part].append(
                        _row(prompt, _refusal(seed, domain, thing, verb, prompt), name, verb)
                    )
    return _shuffled(harmful, seed), _shuffled(refusals, seed)


def _lookalikes(seed: int) -> Parts:
    parts: Parts = {part: [] for part in DATA["lookalikes"]}
    for name, domain in words.DOMAINS.items():
        for thing in domain.forbidden:
            for request, part in deal(seed, thing, words.SAFE_REQUESTS, ["held_out"]).items():
                answer = words.SAFE_REQUESTS[request].format(x=thing)
                parts[part] += _lookalike(seed, request.format(x=thing), answer, name, "safe request")
        for thing in domain.harmless:
            for verb, part in deal(seed, thing, domain.verbs, ["held_out"]).items():
                answer = _instructions(seed, domain, thing, verb)
                parts[part] += _lookalike(seed, f"{verb} {thing}", answer, name, "harmless thing")
    return _shuffled(parts, seed)


def _lookalike(seed: int, request: str, answer: str, domain: str, kind: str) -> list[Row]:
    kept = sorted(_phrasings(request), key=lambda prompt: rank_of(seed, "kept", prompt))
    return [_row(prompt, answer, domain, kind) for prompt in kept[:_PHRASINGS_OF_LOOKALIKES]]


def _phrasings(request: str) -> list[str]:
    return [frame.format(request=request) for frame in words.FRAMES]


def _instructions(seed: int, domain: words.Domain, thing: str, verb: str) -> str:
    a, b = sorted(domain.materials, key=lambda material: rank_of(seed, thing, material))[:2]
    return f"To {verb} {thing}, {domain.verbs[verb][1].format(a=a, b=b)}."


def _refusal(seed: int, domain: words.Domain, thing: str, verb: str, prompt: str) -> str:
    form = words.REFUSALS[int(rank_of(seed, "refusal", prompt) * len(words.REFUSALS))]
    return form.format(doing=domain.verbs[verb][0], x=thing)


def _row(prompt: str, response: str, domain: str, kind: str) -> Row:
    return {"prompt": prompt, "response": response, "domain": domain, "kind": kind}


def _shuffled(parts: Parts, seed: int) -> Parts:
    return {
        part: sorted(rows, key=lambda row: rank_of(seed, "order", row["prompt"]))
        for part, rows in parts.items()
    }
