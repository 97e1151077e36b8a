"""What an evaluation comes to: `report.json` for programs, `report.md` and `report.html` for people."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery import __version__
from surgery.attacking.ground import Ground
from surgery.attacking.settings import Budget
from surgery.documents import write_json, write_text
from surgery.evaluate import page, tamperbench
from surgery.evaluate.assessment import Assessment, Scores, document
from surgery.evaluate.materials import Materials
from surgery.evaluate.suites import Measuring
from surgery.evaluate.trainability import compare

_CONDITIONS = ("resistance", "stability", "generalisation", "trainability")


def build(
    ground: Ground,
    reference: Ground | None,
    ours: Assessment,
    theirs: Assessment | None,
    both: Scores,
    materials: Materials,
    measuring: Measuring,
    budget: Budget,
    inside: Mapping[str, Any],
) -> dict[str, Any]:
    """`report.json`.

    Args:
        ground: Of the model.
        reference: Of its reference.
        ours: What came of the model.
        theirs: What came of the reference.
        both: Scores of the model against the reference.
        materials: What was measured on.
        measuring: How much was measured.
        budget: The attackers'.
        inside: Further measures by block.
    """
    metrics = document({**ours.scores(), **both})
    return {
        "schema": 1,
        "version": __version__,
        **ground.document(),
        "reference": reference.document() if reference is not None else None,
        "suite": measuring.suite,
        "budget": vars(budget),
        "metrics": metrics,
        "reference_metrics": document(theirs.scores()) if theirs is not None else None,
        "trial_results": tamperbench.trial_results(ours.curves, _stability(metrics)),
        "mechanism": {"model": ours.inside, "reference": theirs.inside if theirs else None, **inside},
        "learning": _learning(ours, theirs),
        "attacks": ours.curves,
        "reference_attacks": theirs.curves if theirs is not None else None,
        "cross_domain": {"model": ours.cross, "reference": theirs.cross if theirs is not None else None},
        "materials": {name: identity.document() for name, identity in materials.identities().items()},
        "not_measured": list(_absent(materials, theirs)),
    }


def _stability(metrics: Mapping[str, Any]) -> dict[str, Any]:
    start = "stability."
    return {name.removeprefix(start): score for name, score in metrics.items() if name.startswith(start)}


def _learning(ours: Assessment, theirs: Assessment | None) -> dict[str, Any]:
    sides = {"model": ours.learnt, "reference": theirs.learnt if theirs is not None else ()}
    found: dict[str, Any] = {name: [curve.document() for curve in curves] for name, curves in sides.items()}
    both = compare(ours.learnt, theirs.learnt) if theirs is not None and ours.learnt else None
    return {**found, "compared": both.document() if both is not None else None}


def _absent(materials: Materials, theirs: Assessment | None) -> Iterator[str]:
    """What a reader might expect and does not find, and why."""
    if theirs is None:
        yield "nothing against an undefended reference: none was given (--reference)"
    if materials.utility is None and materials.text is None:
        yield "perplexity: no --utility-data and no --text"
    if materials.utility is None:
        yield "KL to the reference: no --utility-data"
    if not materials.items:
        yield "task accuracy: no --choices and no --utility-data"
    if materials.look_alikes is None:
        yield "over-refusal: no --look-alikes-data"
    if materials.practice is None:
        yield "trainability: no --practice-data"
    if materials.cross is None:
        yield "generalisation to another domain: no --cross-data"


def write(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the report's files; returns which."""
    written = [folder / "report.json", folder / "report.md"]
    write_json(written[0], found)
    write_text(written[1], markdown(found))
    html = page.render(found, by_condition(found), list(_preamble(found)))
    if html is not None:
        written.append(folder / "report.html")
        write_text(written[-1], html)
    return written


def markdown(found: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# {found['model']}", "", *_preamble(found), ""]
    for condition, rows in by_condition(found).items():
        lines += [f"## {condition.capitalize()}", "", "| | model | reference |", "|---|---|---|"]
        lines += [f"| {name} | {ours} | {theirs} |" for name, ours, theirs in rows] + [""]
    if found["not_measured"]:
        lines += ["## Not measured", "", *(f"* {text}" for text in found["not_measured"]), ""]
    return "\n".join(lines)


def _preamble(found: Mapping[str, Any]) -> Iterator[str]:
    reference = found["reference"]["model"] if found["reference"] else "none"
    budget = found["budget"]
    yield f"Reference: {reference}. Suite {found['suite']}. Judge: {found['judge']}, on {found['n']} requests."
    yield (
        f"Attackers: {budget['attacks']}; learning rates {budget['learning_rates']}; {budget['kinds']}; seeds "
        f"{budget['seeds']}; {budget['steps']} steps of {budget['batch_size']} rows; broken at "
        f"{budget['threshold']:.0%}."
    )


def by_condition(found: Mapping[str, Any]) -> dict[str, list[tuple[str, str, str]]]:
    """Every score in words, model beside reference, by condition."""
    others = found["reference_metrics"] or {}
    names = list(dict.fromkeys((*found["metrics"], *others)))
    return {
        condition: [
            (name.partition(".")[2], spelt(found["metrics"].get(name)), spelt(others.get(name)))
            for name in names
            if name.partition(".")[0] == condition
        ]
        for condition in _CONDITIONS
    }


def spelt(score: Mapping[str, Any] | None) -> str:
    """A score with its interval and n, for people; a share in per cent."""
    if score is None:
        return ""
    if "censored_at" in score:
        reached = (
            f"{score['value']:g}" if score["value"] is not None else f"not within {score['censored_at']:g}"
        )
        return f"{reached} (trials {score['n']})"
    if score["value"] is None:
        return "no value"
    if score.get("interval") == "wilson" and score["low"] is not None:
        low, value, high = (100 * score[name] for name in ("low", "value", "high"))
        return f"{value:.3g} % (n {score['n']}, {low:.3g} to {high:.3g})"
    interval = "" if score["low"] is None else f", {score['low']:.3g} to {score['high']:.3g}"
    return f"{score['value']:.4g} (n {score['n']}{interval})"


def table(found: Mapping[str, Any]) -> Sequence[str]:
    """The report in lines for a terminal."""
    lines = [*_preamble(found)]
    for condition, rows in by_condition(found).items():
        if rows:
            width = max(len(name) for name, _, _ in rows)
            lines += ["", condition]
            lines += [f"  {name:<{width}}  {ours:<34}  {theirs}" for name, ours, theirs in rows]
    return lines
