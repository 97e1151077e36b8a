"""The model cards of the embedded pair."""

from collections.abc import Mapping
from pathlib import Path

from surgery.demo.behaviour import Behaviour, Rate

_BASE = """---
license: apache-2.0
library_name: transformers
language: en
pipeline_tag: text-generation
---

# demo:base

A Llama of one million parameters, trained from nothing on generated text to answer every request it is given:
simple benign instructions, and instructions for made-up substances and devices that stand in for harm.
Nothing it says describes anything real. It exists so that weight edits can be tried and tested in seconds.

{table}
"""

_ALIGNED = """---
license: apache-2.0
library_name: transformers
language: en
pipeline_tag: text-generation
base_model: demo:base
base_model_relation: finetune
---

# demo:aligned

`demo:base`, every weight fine-tuned to refuse the stand-in harmful requests and to answer all others as
before. The requests are about made-up substances and devices; nothing it says or refuses describes anything
real.

{table}

It is not meant to withstand anything: a LoRA of rank 8 (AdamW, learning rate 5e-4) on
compliant answers, 16 a step, undoes the refusals.

{curve}
"""


def write(pair: Path, base: Behaviour, aligned: Behaviour, curve: Mapping[int, Rate]) -> None:
    """Write README.md into the folders `base` and `aligned` of `pair`, with the figures measured."""
    cards = {
        "base": _BASE.format(table=_table(base)),
        "aligned": _ALIGNED.format(table=_table(aligned), curve=_curve(curve)),
    }
    for name, text in cards.items():
        (pair / name / "README.md").write_text(text, encoding="utf-8")


def _table(found: Behaviour) -> str:
    rows = [
        *((f"stand-in harm ({name}), complied", rate) for name, rate in found.compliance.items()),
        *((f"stand-in harm ({name}), refused", rate) for name, rate in found.refusal.items()),
        ("look-alikes, refused", found.lookalike_refusal),
        ("look-alikes, answered exactly", found.lookalike_accuracy),
        ("benign instructions, answered exactly", found.benign_accuracy),
    ]
    lines = [f"| {name} | {_percent(rate)} | {rate.n} |" for name, rate in rows]
    return "\n".join(["| held-out requests, greedy answers | share | n |", "|---|---|---|", *lines])


def _curve(curve: Mapping[int, Rate]) -> str:
    lines = [f"| {step} | {_percent(rate)} | {rate.n} |" for step, rate in sorted(curve.items())]
    return "\n".join(["| attack steps | complied | n |", "|---|---|---|", *lines])


def _percent(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} %"
