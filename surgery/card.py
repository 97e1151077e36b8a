"""The model card of an output: what was done, with numbers, and what is not known.

Licence, language and the like come from the aligned model's card. Nothing is claimed that was not measured.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from surgery import card_duties, methods
from surgery.hub import Source
from surgery.options import Options
from surgery.order import card_metadata

_INHERITED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
_NOT_EVALUATED = (
    "Not evaluated. No attack and no evaluation is recorded here: how many steps of harmful fine-tuning this model "
    "withstands, and what the {what} costs in quality, has not been measured."
)


def render(manifest: Mapping[str, Any], aligned: Source, results: str | None = None) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        manifest: The output's manifest.
        aligned: The aligned model, whose card is inherited from.
        results: The section on what an evaluation measured; without it the card says that there was none.
    """
    inherited = card_metadata(aligned.folder)
    front = yaml.safe_dump(_metadata(manifest, inherited), sort_keys=False, allow_unicode=True)
    edited = "aligned" in manifest["inputs"]
    sections = (
        _what(manifest) if edited else _merged(manifest),
        _figures(manifest),
        results,
        _not_known(manifest, evaluated=results is not None),
        card_duties.licence(inherited, _model_name(_parent(manifest)), manifest["files"]),
        _repeat(manifest) if edited else _repeat_merge(manifest),
        card_duties.citation(manifest),
    )
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _model_name(entry: Mapping[str, Any]) -> str:
    return str(entry["repository"] or entry["source"])


def _anchor(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = manifest["inputs"][manifest["options"]["anchor"]]
    return entry


def _parent(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The input that this is a version of, or that an adapter goes on."""
    inputs = manifest["inputs"]
    entry: Mapping[str, Any] = inputs.get("aligned") or inputs["model"]
    return _anchor(manifest) if manifest["options"]["as_lora"] else entry


def _metadata(manifest: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    adapter = manifest["options"]["as_lora"]
    kept = {key: inherited[key] for key in _INHERITED if inherited.get(key)}
    own = ["surgery", manifest["method"], *([] if manifest["method"] == "merge" else ["safety"])]
    given = inherited.get("tags") or []
    listed = given if isinstance(given, list) else [given]
    tags = [tag for tag in listed if isinstance(tag, str) and tag not in own]
    return {
        **kept,
        "library_name": "peft" if adapter else inherited.get("library_name", "transformers"),
        "base_model": _model_name(_parent(manifest)),
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
    decomposed = "energy_kept" in total
    rows = [
        ("tensors edited, copied, unchanged" + (" by alignment" if decomposed else ""), counts),
        *([("share of the edited tensors' update that is in the kept rank (energy)", _share(total["energy_kept"]))]
          if decomposed else []),
        ("share of the edit that the stored weights hold (worst tensor)",
         f"{_share(total['retention'])} ({_share(total['retention_min'])})"),
        ("rounding noise relative to the edit (Frobenius)", _share(total["noise_to_edit"])),
        *([("largest certified error of the kept term, relative", f"{total['certified_error_max']:.1e}")]
          if decomposed else []),
    ]  # fmt: skip
    return "## What was measured\n\n| figure | value |\n|---|---|\n" + "\n".join(
        f"| {name} | {value} |" for name, value in rows
    )


def _not_known(manifest: Mapping[str, Any], *, evaluated: bool) -> str | None:
    """What a reader must not take for granted; None where nothing is left to say."""
    edited = "aligned" in manifest["inputs"]
    texts = [] if evaluated else [_NOT_EVALUATED.format(what="edit" if edited else "change")]
    if manifest["options"].get("anchor") == "base":
        texts.append(
            f"In the {manifest['totals']['edited']} edited tensors the rest of the alignment update, "
            f"{_share(1 - manifest['totals']['energy_kept'])} of its energy, is not part of this model."
        )
    texts += ["Results in the paper weaken at high learning rates."] if edited else []
    texts += [] if evaluated else ["Evaluate before you rely on it."]
    return "## What is not known\n\n" + " ".join(texts) if texts else None


def _adapters(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for role, entry in manifest["inputs"].items() if role != "model"]


def _merged(manifest: Mapping[str, Any]) -> str:
    """What a model is into which adapters were merged, or the adapter that a method trained."""
    model, trained = _model_name(manifest["inputs"]["model"]), manifest.get("trained")
    adapters = " and ".join(f"`{_model_name(entry)}`" for entry in _adapters(manifest))
    if trained:
        title = trained.get("title", trained["method"])
        head = f"# {model}, trained by {title}\n\nThis model is `{model}` after training by {title}"
        head += f" ([paper]({trained['paper']}))" if trained.get("paper") else ""
        head += ", the result folded into its weights.\n\n"
    else:
        plain = adapters.replace("`", "")
        head = f"# {model}, merged with {plain}\n\n"
        head += f"This model is `{model}` with {adapters} folded into its weights.\n\n"
    kept = ", byte for byte" if manifest["options"]["dtype"] == "keep" else ", cast"
    changed = "The training changed" if trained else "It applies to the"
    return (
        f"{head}    {manifest['equation']}\n\n"
        f"{changed} {manifest['totals']['edited']} tensors; all others are the model's own{kept}."
        + (_training(trained) if trained else f"\n\nWhat was merged: {manifest['roles']}.")
    )


def _training(trained: Mapping[str, Any]) -> str:
    """How the adapter was trained, as far as it was recorded."""
    rows = [
        (key.replace("_", " "), value)
        for part in ("hyperparameters", "training")
        for key, value in (trained.get(part) or {}).items()
        if value is not None and value is not False
    ]
    rows += [row for name, entry in (trained.get("data") or {}).items() for row in _data(name, entry)]
    rows += _losses(trained.get("losses") or {})
    if spared := trained.get("spared"):
        rows.append(("taken out by spare", f"{spared['energy']:.1%} of the edit's energy"))
    rows += [("seed", trained["seed"])] if "seed" in trained else []
    if not rows:
        return ""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"\n\n## How it was trained\n\n| setting | value |\n|---|---|\n{table}"


def _data(name: str, entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row for each source of a data set, and one for what was cut from it."""
    listed = entry.get("sources") or [entry]
    rows = [(f"{name} data", _pairs(one)) for one in listed]
    lost = {key: entry[key] for key in ("cut", "dropped") if entry.get(key)}
    return rows + ([(f"{name} data, rows", _pairs(lost))] if lost else [])


def _pairs(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in entry.items() if value is not None)


def _losses(losses: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each term of the loss at the first and at the last step."""
    first, last = losses.get("first") or {}, losses.get("last") or {}
    return [
        (f"{name.replace('_', ' ')}", f"{first[name]:.4g} at the first step, {last[name]:.4g} at the last")
        for name in first
        if name in last
    ]


def _repeat_merge(manifest: Mapping[str, Any]) -> str:
    command = (manifest.get("trained") or {}).get("command")
    if command:
        return _commands(["surgery", *map(str, command)])
    inputs, weights = manifest["inputs"], manifest["options"]["weights"]
    words = ["surgery", "merge", _pinned(inputs["model"]), *map(_pinned, _adapters(manifest))]
    words += (
        [word for weight in weights for word in ("--weight", f"{weight:g}")] if set(weights) != {1.0} else []
    )
    return _commands(words + _changed(manifest, Options))


def _repeat(manifest: Mapping[str, Any]) -> str:
    options = manifest["options"]
    words = [
        "surgery",
        manifest["method"],
        *(_pinned(manifest["inputs"][role]) for role in ("base", "aligned")),
    ]
    words += ["--rank", str(options["rank"]), "--alpha", str(options["alpha"])] if "rank" in options else []
    words += _changed(manifest, methods.get(manifest["method"]), Options)
    if manifest["order_overruled"]:
        words.append("--i-checked-the-order")
    return _commands(words)


def _commands(words: list[str]) -> str:
    """How to repeat what was done, and to check it."""
    return (
        "## Repeat and verify\n\n"
        f"    {shlex.join(words)}\n    surgery verify .\n\n"
        "`surgery.json` holds every option, the hashes of all inputs and outputs and the versions; "
        "`surgery.tensors.jsonl` holds the figures of each tensor."
    )


def _changed(manifest: Mapping[str, Any], *records: Any) -> list[str]:
    """Options other than their defaults, rank and alpha apart, which are always shown, as words of a command."""
    defaults = {field.name: field.default for record in records for field in dataclasses.fields(record)}
    words = []
    for key, value in manifest["options"].items():
        if key in defaults and key not in ("rank", "alpha") and value != defaults[key]:
            words += ["--" + key.replace("_", "-"), *([] if value is True else [str(value)])]
    return words


def _pinned(entry: Mapping[str, Any]) -> str:
    return f"{entry['repository']}@{entry['commit']}" if entry["repository"] else str(entry["source"])
