"""The commands of methods that edit weights: `surgery lox BASE ALIGNED`."""

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery import methods
from surgery.cli import commands, output

_ARGUMENTS = (
    ("base", "BASE", "The checkpoint before alignment: a folder, ORG/NAME[@REV], demo:base."),
    ("model", "ALIGNED", "The aligned checkpoint made from it."),
)


def _arguments() -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[str, typer.Argument(metavar=metavar, help=text, show_default=False)],
        )
        for name, metavar, text in _ARGUMENTS
    ]


def _common() -> list[inspect.Parameter]:
    """Options that are the command's own: where the result goes and how it is shown."""
    options: list[tuple[str, Any, Any, list[str], str]] = [
        (
            "output",
            Path | None,
            None,
            ["--output", "-o"],
            "The folder to write; by default ./<aligned>-<method>.",
        ),
        ("plan", bool, False, ["--plan"], "Read headers only, print what would happen, write nothing."),
        ("json", bool, False, ["--json"], "Print one JSON document on stdout."),
        ("quiet", bool, False, ["--quiet", "-q"], "Print nothing but errors and warnings."),
    ]
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, typer.Option(*flags, help=text, show_default=False)],
        )
        for name, kind, default, flags, text in options
    ]


def command(name: str) -> Any:
    """The callback of a method's command, its options made from the method's and the run's records."""
    from surgery.options import Options

    method = methods.get(name)
    parameters = [
        *_arguments(),
        *_common(),
        *commands.parameters(method, f"{method.title} options"),
        *commands.parameters(Options, "Run options"),
    ]
    return commands.with_signature(lambda values: _run(method, values), parameters, _help(method))


def _help(method: type) -> str:
    """A method's docstring up to its sources, its equations kept from being re-wrapped."""
    doc = inspect.getdoc(inspect.getmodule(method)) or ""
    paragraphs = doc.partition("\n\nPerin")[0].split("\n\n")
    return "\n\n".join("\b\n" + text if text.startswith("    ") else text for text in paragraphs)


def _run(method: type, values: dict[str, Any]) -> None:
    """Plan or carry out an edit and print what came of it."""
    from surgery import pipeline, processes
    from surgery.job import prepare
    from surgery.options import Options

    commands.require_one_output(values["quiet"], values["json"])
    if not processes.speaks():
        values |= {"quiet": True, "json": False}
    if values["quiet"]:
        # Read by the Hub's client when it is first imported, which only a Hub source does.
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    job = prepare(
        commands.from_fields(method, values),
        base=values["base"],
        model=values["model"],
        output=values["output"],
        options=commands.from_fields(Options, values),
    )
    if values["plan"]:
        if values["json"]:
            output.document(job.plan.document())
        elif not values["quiet"]:
            output.plan(job)
        return
    with output.ShardProgress(quiet=values["quiet"]) as progress:
        done = pipeline.run(job, progress)
    if values["json"]:
        output.document(done.document())
    elif not values["quiet"]:
        output.outcome(job, done)
    output.warnings(job, done)


def option_names(record: type) -> list[str]:
    """The options a record becomes, as the command spells them."""
    return ["--" + field.name.replace("_", "-") for field in dataclasses.fields(record)]
