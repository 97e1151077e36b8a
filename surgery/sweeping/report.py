"""A sweep as files and as lines for people."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.documents import write_json, write_text
from surgery.scores import from_document
from surgery.sweeping import page
from surgery.sweeping.labels import labels
from surgery.sweeping.study import Measured

SWEEP, RANK = "sweep.json", "effective-rank.json"
"""What the documents are called in their folder."""


def write(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `sweep.json`, and `sweep.html` where there is a plot to draw; returns what was written."""
    write_json(folder / SWEEP, found)
    html = page.render(found)
    if html is None:
        return [folder / SWEEP]
    write_text(folder / "sweep.html", html)
    return [folder / SWEEP, folder / "sweep.html"]


def write_rank(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `effective-rank.json`; returns what was written."""
    write_json(folder / RANK, found)
    return [folder / RANK]


def write_landscape(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `landscape.json`, and `landscape.html` where plots can be drawn; returns what was written."""
    write_json(folder / "landscape.json", found)
    html = page.landscape(found)
    if html is None:
        return [folder / "landscape.json"]
    write_text(folder / "landscape.html", html)
    return [folder / "landscape.json", folder / "landscape.html"]


def landscape_table(found: Mapping[str, Any]) -> Iterator[str]:
    """The rate at every point: x along the lines, y down them."""
    rate = found["rate"]
    values = {
        (point["params"]["x"], point["params"]["y"]): point.get("scores", {}).get(rate)
        for point in found["points"]
    }
    xs, ys = (sorted({place[axis] for place in values}) for axis in (0, 1))
    yield f"{rate} on {found['n']} requests; x is alpha of LoX, y fine-tuning"
    yield f"{'y':>8}" + "".join(f"{f'x {x:g}':>9}" for x in xs)
    for y in ys:
        yield f"{y:>8g}" + "".join(f"{spelt(values.get((x, y))):>9}" for x in xs)


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each trial, those on the front marked; before them what all trials have in common."""
    rate = found["rate"]
    columns = {
        "break": "resistance.steps_to_break",
        rate[:12]: f"resistance.worst_case_{rate}",
        "harm loss": "resistance.harmful_loss",
        "perplexity x": "stability.perplexity_ratio",
        "over-refusal": "stability.over_refusal",
        "incoherent": "stability.incoherent_rate",
    }
    names, same = labels([trial["params"] for trial in found["trials"]])
    width = max([5, *map(len, names)])
    if same:
        yield f"all with {same}"
    yield f"{'':2}{'trial':<{width}}" + "".join(f"{name:>14}" for name in columns)
    for name, trial in zip(names, found["trials"], strict=True):
        start = f"{'*' if trial['front'] else '':2}{name:<{width}}"
        if "error" in trial:
            yield f"{start} failed: {trial['error']}"
        else:
            yield start + "".join(f"{spelt(trial['scores'].get(name)):>14}" for name in columns.values())
    if found["objectives"]:
        yield f"* on the Pareto front of {', '.join(found['objectives'])}"


def rank_table(found: Mapping[str, Any]) -> Iterator[str]:
    """The scan of the effective rank, a line for each rank."""
    yield f"aligned {spelt(found['aligned'])}"
    for scanned in found["scanned"]:
        yield f"rank {scanned['rank']:>4} {spelt(scanned)}"
    yield f"effective rank {found['effective_rank']} (within {found['tolerance']:g} of the aligned model)"


def spelt(score: Mapping[str, Any] | None) -> str:
    """A score's point, for people."""
    if score is None:
        return ""
    if "censored_at" in score and score["value"] is None:
        return f"> {score['censored_at']:g}"
    return "" if score["value"] is None else f"{score['value']:.4g}"


def measured(found: Mapping[str, Any]) -> list[Measured]:
    """The trials of a document, to choose among."""
    return [
        Measured(
            trial["params"],
            {name: from_document(known) for name, known in trial["scores"].items()},
            trial["figures"],
            trial.get("error"),
        )
        for trial in found["trials"]
    ]
