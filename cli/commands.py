"""Commands made from records: fields become options, their docs the help, their defaults stay the same."""

import dataclasses
import inspect
import itertools
import os
import types
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from annotated_doc import Doc

from surgery import processes
from surgery.choices import NEGATABLE
from surgery.errors import UsageError


def parameters(
    record: type,
    panel: str,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    leave_out: Collection[str] = (),
) -> list[inspect.Parameter]:
    """A keyword parameter for each field of a record, as Typer wants options declared.

    Args:
        record: A dataclass.
        panel: The heading in the help.
        defaults: Values that stand in for those of the record.
        leave_out: Fields that are no options here.
    """
    hints = inspect.get_annotations(record, eval_str=True)
    return [
        _parameter(field, hints[field.name], panel, defaults.get(field.name, field.default))
        for field in dataclasses.fields(record)
        if field.name not in leave_out
    ]


def _parameter(field: dataclasses.Field, hint: Any, panel: str, default: Any) -> inspect.Parameter:
    kind, doc, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint, Doc(""))
    option = "--" + field.name.replace("_", "-")
    if NEGATABLE in marks:
        option += "/--no-" + field.name.replace("_", "-")
    shape, parser, metavar = _accepted(field.name, kind)
    info = typer.Option(
        option,
        help=doc.documentation,
        parser=parser,
        metavar=metavar,
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[shape, info]
    )


def _accepted(name: str, kind: Any) -> tuple[Any, Callable[[Any], Any] | None, str | None]:
    """What Typer is to be told of a field's type: the type, a parser for unions, and what help shows."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, None, None
    members = [member for member in get_args(kind) if member is not type(None)]
    if len(members) == 1:
        return members[0] | None, None, "REGEX" if name in ("include", "exclude") else None
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    shown = "|".join(["INT", *words])

    def parse(text: Any) -> Any:
        if isinstance(text, int) or text in words:
            return text
        try:
            return int(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not one of {shown}") from None

    return str, parse, shown


def from_fields(record: type, values: Mapping[str, Any]) -> Any:
    """The record whose fields have these values; fields that have none keep their default."""
    return record(
        **{field.name: values[field.name] for field in dataclasses.fields(record) if field.name in values}
    )


def help_text(method: type) -> str:
    """A method's docstring up to its sources, its equations kept from being re-wrapped."""
    doc = inspect.getdoc(inspect.getmodule(method)) or ""
    paragraphs = itertools.takewhile(lambda text: "https://" not in text, doc.split("\n\n"))
    return "\n\n".join("\b\n" + text if text.startswith("    ") else text for text in paragraphs)


def with_signature(function: Callable, parameters: list[inspect.Parameter], doc: str) -> Callable:
    """The function, presenting these parameters to Typer."""

    def command(**values: Any) -> None:
        function(values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = doc
    return command


def settle_output(values: dict[str, Any]) -> None:
    """Settle what is printed (`quiet`, `json`): nothing by any process of a run but the first.

    Raises:
        UsageError: Both were asked for.
    """
    if values["quiet"] and values["json"]:
        raise UsageError("--json and --quiet contradict each other; choose one")
    if not processes.speaks():
        values |= {"quiet": True, "json": False}
    if values["quiet"]:
        # Read by the Hub's client and by datasets when they are first imported, which only a Hub source does.
        for library in ("HUB", "DATASETS"):
            os.environ[f"HF_{library}_DISABLE_PROGRESS_BARS"] = "1"
