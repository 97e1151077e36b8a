"""A sweep as one page with its Pareto plot, and a landscape as a map."""

from collections.abc import Mapping
from typing import Any

from surgery.pages import figures, page
from surgery.pages.figures import Series
from surgery.sweeping.labels import labels

_ACROSS = ("stability.perplexity_ratio", "stability.over_refusal")


def render(found: Mapping[str, Any]) -> str | None:
    """The page; None where the extra `report` is not installed, or no trial could be measured."""
    good = [trial for trial in found["trials"] if "error" not in trial]
    if not good or not figures.available():
        return None
    up = "resistance.harmful_loss"
    drawn = [
        _plot(good, across, up) for across in _ACROSS if all(across in trial["scores"] for trial in good)
    ]
    lead = [
        f"{len(good)} trials of {found['method']} on {found['model']}; {found['n']} held-out requests.",
        f"Judge: {found['judge']}.",
        f"On the front: no other trial is better in one of {', '.join(found['objectives'])} and as good in the rest.",
    ]
    return page.render(
        f"Sweep of {found['model']}", [page.Section("Pareto front", figures=drawn), _table(good)], lead
    )


def _plot(trials: list[Mapping[str, Any]], across: str, up: str) -> page.Drawing:
    values = [[trial["scores"][name]["value"] for trial in trials] for name in (across, up)]
    svg = figures.scatter(
        Series("", [value or 0.0 for value in values[0]], values[1]),
        x=across.partition(".")[2].replace("_", " "),
        y="harmful loss after the attack, nats",
        names=labels([trial["params"] for trial in trials])[0],
        front=[place for place, trial in enumerate(trials) if trial["front"]],
    )
    return page.Drawing(svg, f"Each trial: {up} against {across}; filled: on the front.")


def _table(trials: list[Mapping[str, Any]]) -> page.Section:
    scores = list(dict.fromkeys(name for trial in trials for name in trial["scores"]))
    names, same = labels([trial["params"] for trial in trials])
    rows = [
        [name + (" *" if trial["front"] else ""), *(_cell(trial["scores"].get(score)) for score in scores)]
        for name, trial in zip(names, trials, strict=True)
    ]
    told = [*([f"All with {same}."] if same else []), "* on the front."]
    return page.Section("All trials", told, tables=[page.Table(["trial", *scores], rows)])


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    if "censored_at" in score:
        return f"> {score['censored_at']:g}" if score["value"] is None else f"{score['value']:g}"
    return "none" if score["value"] is None else f"{score['value']:.4g}"


def landscape(found: Mapping[str, Any]) -> str | None:
    """A landscape as a page; None where the extra `report` is not installed."""
    if not figures.available():
        return None
    places = {(one["params"]["x"], one["params"]["y"]): one.get("scores", {}) for one in found["points"]}
    xs, ys = (sorted({place[axis] for place in places}) for axis in (0, 1))
    drawn = []
    for name, bounds in ((found["rate"], (0.0, 1.0)), ("harmful_loss", None)):
        values = [[places.get((x, y), {}).get(name, {}).get("value") for x in xs] for y in ys]
        svg = figures.heat_map(
            values,
            across=[f"{x:g}" for x in xs],
            down=[f"{y:g}" for y in ys],
            x="along LoX (alpha)",
            y="along fine-tuning",
            label=name.replace("_", " "),
            bounds=bounds,
        )
        drawn.append(page.Drawing(svg, f"{name} at theta + x d1 + y d2; the aligned model is at 0, 0."))
    lead = [f"{found['n']} held-out requests; judge: {found['judge']}."]
    return page.render(f"Safety landscape of {found['model']}", [page.Section("Plane", figures=drawn)], lead)
