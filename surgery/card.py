"""The model card of an output: what was done, with numbers, and what is not known.

Licence, language and the like come from the aligned model's card. Nothing is claimed that was not measured.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from surgery import methods
from surgery.hub import Source
from surgery.options import Options
from surgery.order import card_metadata

_INHERITED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


def render(manifest: Mapping[str, Any], aligned: Source) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        manifest: The output's manifest.
        aligned: The aligned model, whose card is inherited from.
    """
    front = yaml.safe_dump(
        _metadata(manifest, card_metadata(aligned.folder)), sort_keys=False, allow_unicode=True
    )
    sections = (_what(manifest), _figures(manifest), _not_known(manifest), _repeat(manifest))
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _model_name(entry: Mapping[str, Any]) -> str:
    return str(entry["repository"] or entry["source"])


def _anchor(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = manifest["inputs"][manifest["options"]["anchor"]]
    return entry


def _metadata(manifest: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    adapter = manifest["options"]["as_lora"]
    parent = _anchor(manifest) if adapter else manifest["inputs"]["aligned"]
    kept = {key: inherited[key] for key in _INHERITED if inherited.get(key)}
    own = ["surgery", manifest["method"], "safety"]
    given = inherited.get("tags") or []
    listed = given if isinstance(given, list) else [given]
    tags = [tag for tag in listed if isinstance(tag, str) and tag not in own]
    return {
        **kept,
        "library_name": "peft" if adapter else inherited.get("library_name", "transformers"),
        "base_model": _model_name(parent),
        "base_model_relation": "adapter" if adapter else "finetune",
        "tags": [*own, *tags],
    }


def _what(manifest: Mapping[str, Any]) -> str:
    names = {role: _model_name(entry) for role, entry in manifest["inputs"].items()}
    kind = "This adapter holds an edit of" if manifest["options"]["as_lora"] else "This model is an edit of"
    return (
        f"# {names['aligned']}, extrapolated by {manifest['method']}\n\n"
        f"{kind} the weights of `{names['aligned']}`, computed from it and `{names['base']}`, the checkpoint it was "
        "aligned from. Nothing was trained. The edit strengthens the main directions of the alignment update, "
        "which is meant to make harmful fine-tuning harder.\n\n"
        f"    {manifest['equation']}\n\n"
        f"Equivalent form: {manifest['equivalent']}. Here `P_k` keeps the k strongest singular directions of a "
        f"weight's change ([paper]({manifest['paper']})). It applies to the {manifest['totals']['edited']} edited "
        "tensors; all others are the aligned model's.\n\n"
        f"Which checkpoint is which: {manifest['roles']}."
    )


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"


def _figures(manifest: Mapping[str, Any]) -> str:
    total = manifest["totals"]
    counts = ", ".join(str(total[key]) for key in ("edited", "copied", "unchanged"))
    rows = [
        ("tensors edited, copied, unchanged by alignment", counts),
        ("share of the edited tensors' update that is in the kept rank (energy)", _share(total["energy_kept"])),
        ("share of the edit that the stored weights hold (worst tensor)",
         f"{_share(total['retention'])} ({_share(total['retention_min'])})"),
        ("rounding noise relative to the edit (Frobenius)", _share(total["noise_to_edit"])),
        ("largest certified error of the kept term, relative", f"{total['certified_error_max']:.1e}"),
    ]  # fmt: skip
    return "## What was measured\n\n| figure | value |\n|---|---|\n" + "\n".join(
        f"| {name} | {value} |" for name, value in rows
    )


def _not_known(manifest: Mapping[str, Any]) -> str:
    dropped = ""
    if manifest["options"]["anchor"] == "base":
        dropped = (
            f" In the {manifest['totals']['edited']} edited tensors the rest of the alignment update, "
            f"{_share(1 - manifest['totals']['energy_kept'])} of its energy, is not part of this model."
        )
    return (
        "## What is not known\n\n"
        "No attack and no evaluation is recorded here: how many steps of harmful fine-tuning this model withstands, "
        "and what the edit costs in quality, has not been measured."
        + dropped
        + " Results in the paper weaken at "
        "high learning rates. Evaluate before you rely on it."
    )


def _repeat(manifest: Mapping[str, Any]) -> str:
    options = manifest["options"]
    words = [
        "surgery",
        manifest["method"],
        *(_pinned(manifest["inputs"][role]) for role in ("base", "aligned")),
    ]
    words += ["--rank", str(options["rank"]), "--alpha", str(options["alpha"])] if "rank" in options else []
    for key, value in _changed(manifest):
        flag = "--" + key.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    if manifest["order_overruled"]:
        words.append("--i-checked-the-order")
    return (
        "## Repeat and verify\n\n"
        f"    {shlex.join(words)}\n    surgery verify .\n\n"
        "`surgery.json` holds every option, the hashes of all inputs and outputs and the versions; "
        "`surgery.tensors.jsonl` holds the figures of each tensor."
    )


def _changed(manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Options other than their defaults, rank and alpha apart, which are always shown."""
    records: tuple[Any, ...] = (methods.get(manifest["method"]), Options)
    defaults = {field.name: field.default for record in records for field in dataclasses.fields(record)}
    options = manifest["options"].items()
    return [(key, value) for key, value in options if key not in ("rank", "alpha") and value != defaults[key]]


def _pinned(entry: Mapping[str, Any]) -> str:
    return f"{entry['repository']}@{entry['commit']}" if entry["repository"] else str(entry["source"])
