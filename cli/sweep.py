"""The command that tries many edits in memory: `surgery sweep lox BASE ALIGNED --rank 1,3,6 --alpha 0.5:2:0.5`.

With a method that trains: `surgery sweep vaccine MODEL --set rho=1,2,4`.
"""

import inspect
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgery.cli import commands, measuring, output
from surgery.errors import CheckError, UsageError

_HELP = """Try many edits of a model in memory and show which are worth having.

Of LoX the update is decomposed once, at the largest rank; every trial patches the model's weights as `surgery lox`
would store them, measures harm, a short attack and utility, and puts the weights back. Of a method that trains, every
trial trains anew, with the fields that --set lists. OUT gets sweep.json, and sweep.html with the Pareto plot where
the extra `report` is installed. Run again, or in several processes, the command goes on with what is left.
"""
_ARGUMENTS: tuple[tuple[str, Any, str, str], ...] = (
    ("method", str, "METHOD", "What is swept: lox, or a method that trains, such as vaccine."),
    (
        "base",
        str,
        "BASE",
        "The checkpoint before alignment: a folder, ORG/NAME[@REV], demo:base; else the MODEL.",
    ),
    ("model", str | None, "[ALIGNED]", "For lox, the aligned checkpoint made from it."),
)
_OWN: list[measuring.Option] = [
    ("output", Path | None, None, ["--output", "-o"], "The folder for the study; ./<model>-sweep."),
    ("set", list[str] | None, None, ["--set"],
     "Values of a field to try, as rho=1,2,4 or steps=20:60:20; of lox: layers, depth, edit, include, exclude."),
    ("storage", str | None, None, ["--storage"], "A database that jobs share, as postgresql://..., not the folder."),
    ("choose", Path | None, None, ["--choose"],
     "Write the best trial within the bounds as a checkpoint, by a run of the method's own command."),
    ("bound", list[str] | None, None, ["--bound"],
     "A bound on a score, as 'stability.over_refusal <= 0.1'; may be given again."),
    ("max_perplexity_ratio", float | None, None, ["--max-perplexity-ratio"],
     "A bound on the perplexity against the model unedited, as 1.02."),
    ("effective_rank", int | None, None, ["--effective-rank"],
     "Scan ranks up to this one for the least that makes the base as safe as the aligned model, and nothing else."),
]  # fmt: skip
_TRAINED: list[measuring.Option] = [
    ("train_aligned_data", list[str] | None, None, ["--train-aligned-data"],
     "What a method trains on: requests as an aligned model answers them. A demo: model has its own."),
    ("train_harmful_data", list[str] | None, None, ["--train-harmful-data"], "The same: answers not to be learnt."),
    ("train_retain_data", list[str] | None, None, ["--train-retain-data"], "The same: answers to be kept."),
    ("preset", Literal["auto", "paper", "small"], "auto", ["--preset"], "Values of fields that --set does not list."),
]  # fmt: skip
_BUDGET = ("limit", "max_new_tokens", "max_length", "margin")
_BOUND = re.compile(r"\s*([\w.-]+)\s*(<=|>=)\s*([-+.\deE]+)\s*")


def command() -> Any:
    """The callback of the command, its options made from records."""
    from surgery.attacking.settings import Budget
    from surgery.options import Options
    from surgery.sweeping.grid import Grid
    from surgery.sweeping.probing import Probing

    arguments = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if name == "model" else inspect.Parameter.empty,
            annotation=Annotated[kind, typer.Argument(metavar=metavar, help=text, show_default=False)],
        )
        for name, kind, metavar, text in _ARGUMENTS
    ]
    unused = [name for name in Budget.__dataclass_fields__ if name not in _BUDGET]
    parameters = [
        *arguments,
        *measuring.options([*_OWN, *measuring.PRINTED]),
        *commands.parameters(Grid, "What is tried"),
        *commands.parameters(Probing, "What is measured"),
        *commands.parameters(Budget, "What is measured", leave_out=unused),
        *measuring.options(measuring.DATA, "Data of attacks"),
        *measuring.options(measuring.MATERIALS, "Data of utility"),
        *measuring.options(measuring.JUDGE, "Judge"),
        *measuring.options(_TRAINED, "Methods that train"),
        *commands.parameters(
            Options, "Run options", leave_out=("stream", "as_lora", "dtype", "overwrite", "allow_pickle")
        ),
    ]
    return commands.with_signature(_run, parameters, inspect.cleandoc(_HELP))


def bounds(values: dict[str, Any]) -> dict[str, tuple[Literal["<=", ">="], float]]:
    """The bounds by score.

    Raises:
        UsageError: One is not understood.
    """
    found: dict[str, tuple[Literal["<=", ">="], float]] = {}
    for text in values["bound"] or ():
        parts = _BOUND.fullmatch(text)
        try:
            value = float(parts[3]) if parts else None
        except ValueError:
            value = None
        if parts is None or value is None:
            raise UsageError(f"bound is {text!r}; it must be NAME <= NUMBER or NAME >= NUMBER")
        found[parts[1]] = ("<=" if parts[2] == "<=" else ">=", value)
    if values["max_perplexity_ratio"] is not None:
        found["stability.perplexity_ratio"] = ("<=", values["max_perplexity_ratio"])
    return found


def _run(values: dict[str, Any]) -> None:
    """Sweep, print what came of it, and write the best where that is asked for."""
    from surgery.sweeping import report

    commands.settle_output(values)
    limits, trained = bounds(values), _trained(values)
    folder = measuring.named({**values, "model": values["model"] or values["base"]}, "sweep")
    ready = _ready_trained(trained, values, folder) if trained is not None else _ready_lox(values, folder)
    told = None if values["quiet"] else measuring.trial
    if values["effective_rank"]:
        found = ready.effective_rank(values["effective_rank"], told)
        written = report.write_rank(found, folder)
    else:
        found = ready.run(told)
        written = report.write(found, folder)
    if values["json"]:
        output.document(found)
    elif not values["quiet"]:
        for text in report.rank_table(found) if values["effective_rank"] else report.table(found):
            output.line(text)
        output.rows([("output", str(path)) for path in written])
    if not values["effective_rank"]:
        _require_one(found)
    if values["choose"] is not None and not values["effective_rank"]:
        _write_best(ready, found, limits, values)


def _require_one(found: dict[str, Any]) -> None:
    """Refuse to call a sweep done of which nothing could be measured.

    Raises:
        CheckError: Every trial failed.
    """
    errors = [trial.get("error") for trial in found["trials"]]
    if all(errors):
        raise CheckError(f"none of {len(errors)} trials could be measured; the first: {errors[0]}")


def _trained(values: dict[str, Any]) -> Any:
    """The class of a method that trains; None for LoX.

    Raises:
        UsageError: There is no such method, or the arguments are not those of its kind.
    """
    from surgery import methods
    from surgery.train.step import TrainedMethod

    kind = methods.get(values["method"])
    if issubclass(kind, TrainedMethod):
        if values["model"] is not None:
            raise UsageError(f"{kind.title} trains one model; leave out {values['model']}, or sweep lox")
        if values["effective_rank"]:
            raise UsageError("--effective-rank is of lox")
        return kind
    if values["model"] is None:
        raise UsageError("a sweep of lox needs two checkpoints: surgery sweep lox BASE ALIGNED")
    return None


def _setting(values: dict[str, Any], folder: Path) -> Any:
    """Where and how trials are measured."""
    from surgery.attacking.settings import Budget
    from surgery.options import Options
    from surgery.sweeping.probing import Probing
    from surgery.sweeping.sweep import Setting
    from surgery.train.sources import Columns

    return Setting(
        folder,
        commands.from_fields(Probing, values),
        commands.from_fields(Budget, values),
        commands.from_fields(Options, values),
        Columns(values["prompt_column"], values["response_column"]),
        {**measuring.data(values), **measuring.materials(values)},
        measuring.judge(values),
        values["storage"],
    )


def _ready_lox(values: dict[str, Any], folder: Path) -> Any:
    from surgery.sweeping import sweep
    from surgery.sweeping.grid import Grid

    return sweep.prepare_lox(
        values["base"],
        values["model"],
        commands.from_fields(Grid, values),
        _setting(values, folder),
        fields=values["set"] or (),
        largest=values["effective_rank"],
    )


def _ready_trained(kind: Any, values: dict[str, Any], folder: Path) -> Any:
    from surgery.cli.train import preset
    from surgery.sweeping import sweep

    given = {name: values[f"train_{name}_data"] for name in ("aligned", "harmful", "retain")}
    return sweep.prepare_trained(
        kind,
        values["base"],
        _setting(values, folder),
        fields=values["set"] or (),
        preset=preset({**values, "model": values["base"]}),
        data={name: sources for name, sources in given.items() if sources},
    )


def _write_best(ready: Any, found: dict[str, Any], limits: dict[str, Any], values: dict[str, Any]) -> None:
    """Write the best trial within the bounds by a run of its own, so that its files are those of the method."""
    from surgery.sweeping import report
    from surgery.sweeping.front import Objective, choose
    from surgery.sweeping.labels import label

    best = choose(report.measured(found), limits, Objective("resistance.steps_to_break", "max"))
    ready.write(best.params, values["choose"])
    if not (values["quiet"] or values["json"]):
        output.rows([("chosen", label(best.params)), ("written", str(values["choose"]))])
