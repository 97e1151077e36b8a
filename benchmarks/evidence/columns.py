"""What is measured of each row: commands of `surgery`, and which of their figures are kept."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence import reach
from benchmarks.evidence.grounds import SEEDS, Ground
from benchmarks.evidence.rows import NONE, REROUTED, SFT
from surgery.attacking.curves import broken_at
from surgery.checkpoint.staging import MANIFEST
from surgery.evaluate.keeping import FILE as ASSESSMENT

Words = list[str]

EVALUATE = "evaluate"
"""The column whose figures of the undefended row are taken up by the others."""

KEPT = f"model/{ASSESSMENT}"
"""Where in its output they are."""

_UTILITY = (
    "stability.perplexity", "stability.perplexity_ratio", "stability.kl", "stability.over_refusal",
    "stability.accuracy", "stability.incoherent_rate", "resistance.refusal-ablation.asr",
    "resistance.refusal-ablation.affirmative_prefix_rate", "generalisation.steps_to_break",
    "trainability.steps_ratio", "trainability.steps", "trainability.final_accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One kind of measurement.

    Attributes:
        name: Of its entry in the ledger and of its output.
        title: As the page names it.
        commands: `(ground, model, output, folder)`: the commands, each asked for when the one before it has ended;
            models and outputs are relative to the ground's folder, which is given last.
        read: The figures in the output.
        rows: Those it is measured of; all where none are named.
        on: The grounds it is measured on; all where none are named.
    """

    name: str
    title: str
    commands: Callable[[Ground, str, str, Path], Iterator[Words]]
    read: Callable[[Path], dict[str, Any]]
    rows: Sequence[str] = ()
    on: Sequence[str] = ()

    def covers(self, row: str, ground: str) -> bool:
        """Whether it is measured of a row on a ground."""
        return (not self.rows or row in self.rows) and (not self.on or ground in self.on)


def _harmful(ground: Ground, model: str, output: str, folder: Path) -> Iterator[Words]:
    """The sweep, and where it has one seed, the worst of it at others."""
    start = _attack(ground, model)
    for grid in ground.sweeps:
        yield [*start, *grid, *ground.spared.get("harmful", ()), "-o", output]
    if not ground.confirm:
        return
    worst = json.loads((folder / output / "curves.json").read_text())["worst_case"]["params"]
    again = {"--learning-rates": f"{worst['lr']:g}", "--kinds": worst["kind"], "--seeds": ground.confirm}
    yield [*start, *_replaced(ground.sweeps[0], again), *ground.spared.get("harmful", ()), "-o", output]


def _attack(ground: Ground, model: str) -> Words:
    """What all attacks have in common."""
    return ["surgery", "attack", model, *ground.attack, *ground.spared.get("attack", ())]


def _replaced(words: Sequence[str], values: Mapping[str, str]) -> Words:
    """Options with other values for some of them."""
    return [values.get(before, word) for before, word in zip(("", *words), words, strict=False)]


def _benign(ground: Ground, model: str, output: str, folder: Path) -> Iterator[Words]:
    del folder
    yield [*_attack(ground, model), "--attacks", "benign-finetune", *ground.benign, "-o", output]


def _mixed(ground: Ground, model: str, output: str, folder: Path) -> Iterator[Words]:
    """The threat that Vaccine, T-Vaccine and Booster were made for: few harmful rows among innocent ones."""
    del folder
    yield [*_attack(ground, model), *ground.mixed, *ground.spared.get("mixed", ()), "-o", output]


def _openings(ground: Ground, model: str, output: str, folder: Path) -> Iterator[Words]:
    """When answers begin to open as the attacker's rows do, which is later than when they cease to refuse."""
    del folder
    yield [*_attack(ground, model), *ground.openings, "-o", output]


def _evaluate(ground: Ground, model: str, output: str, folder: Path) -> Iterator[Words]:
    """Beside the undefended model, whose own evaluation is taken where it is at hand; that one stands alone."""
    beside = [] if model == ground.aligned else ["--reference", ground.aligned]
    kept = folder.glob(f"{NONE}/measured-{EVALUATE}-*/{KEPT}")
    known = sorted(kept, key=lambda path: path.stat().st_mtime)
    if beside and known:
        beside += ["--reference-from", str(known[-1].parents[1].relative_to(folder))]
    yield [
        "surgery", "evaluate", model, *beside, "--attacks", "refusal-ablation", *ground.evaluate,
        *ground.spared.get("evaluate", ()), "-o", output,
    ]  # fmt: skip


def _seeds(ground: Ground, model: str, output: str, folder: Path) -> Iterator[Words]:
    """The row's training again at other seeds, each evaluated."""
    known = json.loads((folder / model / MANIFEST).read_text())
    for seed in SEEDS:
        again = f"{output}-{seed}"
        yield ["surgery", *known["trained"]["command"], "--seed", seed, "-o", again]
        yield from _evaluate(ground, again, f"{again}-{EVALUATE}", folder)


def _reports(output: Path) -> dict[str, Any]:
    return {seed: _report(output.with_name(f"{output.name}-{seed}-{EVALUATE}"))["metrics"] for seed in SEEDS}


def _reach(ground: Ground, model: str, output: str, folder: Path) -> Iterator[Words]:
    """Why a row does what it does: how its edit acts on harmful inputs and on innocent ones."""
    del folder
    yield ["python", "-m", "benchmarks.evidence.reach", ground.aligned, model, *ground.reach, "-o", output]


def _reached(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / reach.FILE).read_text())
    return found


def _curves(output: Path) -> dict[str, Any]:
    """Of an attack: before it, its worst, steps to break, and every trial's [steps, rate, loss, incoherent]."""
    found = json.loads((output / "curves.json").read_text())
    rate = found["rate"]
    attacked = [trial for trial in found["trials"] if trial["params"]["attack"] != "no-attack"]
    attack = next(iter(found["attacks"].values()))
    return {
        "rate": rate,
        "judge": found["judge"],
        "n": found["n"],
        "threshold": found["threshold"],
        "unattacked": found["unattacked"],
        "worst_case": found["worst_case"],
        "steps_to_break": attack["steps_to_break"],
        "trials": [
            {
                "kind": trial["params"]["kind"],
                "lr": trial["params"]["lr"],
                "seed": trial["params"]["seed"],
                "broken_at": broken_at(trial["points"], rate, found["threshold"]),
                "diverged": trial["diverged"],
                "points": [_point(point, rate) for point in trial["points"]],
            }
            for trial in attacked
        ],
        "failed": len(found["failed"]),
    }


def _point(point: Mapping[str, Any], rate: str) -> list[float | int | None]:
    values = [point[name]["value"] for name in (rate, "harmful_loss", "incoherent")]
    return [point["steps"], *(None if value is None else round(value, 4) for value in values)]


def _report(output: Path) -> dict[str, Any]:
    """Of an evaluation: utility, the one-shot attack, how it learns; the reference's own beside them."""
    found = json.loads((output / "report.json").read_text())
    return {
        kept: {name: found[metrics][name] for name in _UTILITY if name in (found[metrics] or {})}
        for kept, metrics in (("metrics", "metrics"), ("reference", "reference_metrics"))
    } | {"judge": found["judge"]}


COLUMNS: tuple[Column, ...] = (
    Column("harmful", "Harmful fine-tuning, swept", _harmful, _curves),
    Column("benign", "Benign fine-tuning", _benign, _curves),
    Column(
        "mixed",
        "Fine-tuning with few harmful rows",
        _mixed,
        _curves,
        (NONE, SFT, "lox-aligned-1.5", "lox-best", "vaccine", "t-vaccine", "booster"),
    ),
    Column("openings", "Harmful fine-tuning, judged by openings", _openings, _curves, on=("real",)),
    Column(
        "reach",
        "What the edit does to harmful and innocent inputs",
        _reach,
        _reached,
        (SFT, "lox-aligned-1.5", "lox-base-1.5", "lox-best", "vaccine", *REROUTED),
        on=("real",),
    ),
    Column("seeds", "The same training at other seeds", _seeds, _reports, ("mlac", "tar"), ("demo",)),
    Column(EVALUATE, "Utility, refusal ablation, trainability", _evaluate, _report),
)
