"""`surgery verify OUT`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from surgery.cli import output


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that surgery wrote.", show_default=False)
    ],
    recompute: Annotated[bool, typer.Option("--recompute", help="Repeat the edit and compare.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --recompute, accept identical bytes only.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Check an output's files against its manifest, and copied tensors against their source."""
    from surgery.verification import verify as check

    found = check(folder, recompute=recompute, strict=strict)
    if json:
        output.document(dataclasses.asdict(found))
    elif not quiet:
        output.verification(found)
