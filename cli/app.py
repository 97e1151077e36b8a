"""The `surgery` command: its groups, its errors and its signals."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from surgery import __version__, methods
from surgery.cli import output
from surgery.cli.verify import verify
from surgery.errors import Interrupted, SurgeryError

# Waiting OpenMP threads that spin make small LAPACK calls up to a hundred times slower beside any other load.
# Read when torch is loaded, so it is set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class MethodCommand(TyperCommand):
    """A method's command, known by name and summary until it is called: only then is the method imported."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the real command, which is built here."""
        from surgery.cli.edit import command

        single = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
        single.command(name=self.name)(command(self.name or ""))
        return typer.main.get_command(single).make_context(info_name, args, parent=parent, **extra)


class MethodGroup(TyperGroup):
    """The top level: the registered commands and one for each file in `surgery/methods/`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name in methods.names():
            summary = methods.summary(name)
            self.add_command(MethodCommand(name=name, help=summary, short_help=summary, rich_markup_mode=None))


app = typer.Typer(
    cls=MethodGroup, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True
)
app.command()(verify)


def _show_version(wanted: bool) -> None:
    if wanted:
        output.line(f"surgery {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Edit released language models so that harmful fine-tuning becomes hard.

    surgery lox demo:base demo:aligned --rank 6 --alpha 1.5 runs on the embedded pair.
    """


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise Interrupted(number)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with the code of its outcome (see `surgery.errors`)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app(args=arguments)
    except SurgeryError as error:
        if os.environ.get(output.DEBUG) == "1":
            raise
        output.failure(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of stdout went away (`surgery ... | head`): nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)
