"""The `surgery` command: its groups, its errors and its signals."""

import errno
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from surgery import __version__, allocator, methods, processes
from surgery.cli import configuring, output
from surgery.cli.card import card
from surgery.cli.ci import ci
from surgery.cli.gate import gate
from surgery.cli.push import push
from surgery.cli.reproduce import reproduce
from surgery.cli.sign import sign
from surgery.cli.verify import verify
from surgery.errors import AccessError, InputError, Interrupted, ResourceError, SurgeryError, UsageError

# Waiting OpenMP threads that spin make small LAPACK calls up to a hundred times slower beside any other load.
# Both are read when torch is loaded, so they are set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Large pages for large tensors: touching fresh memory page by page costs more than the arithmetic done on it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _callback(name: str) -> Any:
    """The function behind a method's command: it edits weights, or it trains."""
    from surgery.train.step import TrainedMethod

    method = methods.get(name)
    if issubclass(method, TrainedMethod):
        from surgery.cli import train

        return train.command(method)
    from surgery.cli import edit

    return edit.command(method)


def _configured(parent: Any, command: Any, name: str | None) -> Any:
    """The context of the top level, with what a file says of this command checked and by its parameters' names."""
    # Every option has its variable, named by one rule that the top level tells: a line for each would bury the help.
    for parameter in command.params:
        parameter.show_envvar = False
    if parent is not None and name is not None and name in (parent.default_map or {}):
        table = configuring.defaults(parent.default_map[name], command.params, name)
        parent.default_map = {**parent.default_map, name: table}
    return parent


class PlainCommand(TyperCommand):
    """A command that is there from the beginning."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The command's context, with what a file says of it."""
        return super().make_context(info_name, args, parent=_configured(parent, self, info_name), **extra)


class MethodCommand(TyperCommand):
    """A method's command, known by name and summary until it is called: only then is the method imported."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the real command, which is built here."""
        single = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
        single.command(name=self.name)(_callback(self.name or ""))
        real = typer.main.get_command(single)
        return real.make_context(info_name, args, parent=_configured(parent, real, info_name), **extra)


class RecordCommand(TyperCommand):
    """A command whose options are made from records when it is called: only then is its module imported."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the real command, which is built here."""
        single = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
        module = import_module(f"surgery.cli.{self.name}")
        single.command(name=self.name)(module.command())
        real = typer.main.get_command(single)
        return real.make_context(info_name, args, parent=_configured(parent, real, info_name), **extra)


_RECORD_COMMANDS = {
    "attack": "Measure what an attacker can do to a model.",
    "evaluate": "Measure a model under four conditions, beside an undefended one.",
    "inspect": "Show what alignment changed in a model's weights.",
    "landscape": "Draw the safety landscape around an aligned model.",
    "merge": "Fold PEFT LoRA adapters into a model's files.",
    "sweep": "Try many edits of a pair in memory and show which are worth having.",
}


class MethodGroup(TyperGroup):
    """The top level: the registered commands and one for each file in `surgery/methods/`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, text in _RECORD_COMMANDS.items():
            self.add_command(RecordCommand(name=name, help=text, short_help=text, rich_markup_mode=None))
        for name in methods.names():
            summary = methods.summary(name)
            self.add_command(
                MethodCommand(name=name, help=summary, short_help=summary, rich_markup_mode=None)
            )


app = typer.Typer(
    cls=MethodGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_PLAIN = (card, ci, gate, push, reproduce, sign, verify)
for _function in _PLAIN:
    app.command(cls=PlainCommand)(_function)
COMMANDS = (*(one.__name__ for one in _PLAIN), *_RECORD_COMMANDS, *methods.names())
"""The names of all commands."""


def _show_version(wanted: bool) -> bool:
    if wanted:
        output.line(f"surgery {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version.",
            callback=_show_version,
            is_eager=True,
            allow_from_autoenv=False,
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="A TOML file with defaults, a table for each command; SURGERY_COMMAND_OPTION goes before it.",
            allow_from_autoenv=False,
        ),
    ] = None,
) -> None:
    """Edit released language models so that harmful fine-tuning becomes hard.

    surgery lox demo:base demo:aligned --rank 6 --alpha 1.5 runs on the embedded pair.
    """


def _lacks_memory(error: Exception) -> bool:
    """Whether Python, the CPU allocator of torch or its GPU allocator found no memory."""
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def as_surgery_error(error: SurgeryError | OSError | MemoryError | RuntimeError) -> SurgeryError:
    """The same error with an exit code: memory or disk is 4, a missing right 5, what else the system refuses 3."""
    if isinstance(error, SurgeryError):
        return error
    if not isinstance(error, OSError):
        return ResourceError(
            "the memory ran out; free some or use a larger machine, and run the same command again to resume"
        )
    what = f"{error.filename or 'the system'}: {error.strerror or error}"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return AccessError(
            f"{what}; you need the right to read the inputs and to write where the output goes"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{what}; free some space and run the same command again")
    return InputError(f"{what}; check the path ({output.DEBUG}=1 shows where this was met)")


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise Interrupted(number)


def _usage(error: TyperException) -> UsageError:
    """What the parser of the command line says, in one line."""
    text = " ".join(error.format_message().split()).removesuffix(".").replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    return UsageError(f"{text}; see {context.command_path if context else 'surgery'} --help")


def _stdout_is_closed() -> None:
    """The reader of stdout went away (`surgery ... | head`): nothing is left to tell it, also not at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)


def _run(arguments: Sequence[str] | None) -> int:
    """Run the command; the exit code where nothing is raised."""
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        words, file = configuring.taken(words)
        code = app(
            args=words or ["--help"],
            standalone_mode=False,
            default_map=configuring.read(file, COMMANDS) if file else None,
            auto_envvar_prefix=configuring.PREFIX,
            obj=file,
        )
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except TyperException as error:
        raise _usage(error) from None
    except BrokenPipeError:
        _stdout_is_closed()
        return 0
    except SystemExit as stop:
        # Typer turns a closed stdout into exit code 1, having put a wrapper in its place that ignores it.
        if sys.stdout is sys.__stdout__ or stop.code != 1:
            raise
        _stdout_is_closed()
        return 0


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with the code of its outcome (see `surgery.errors`)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    allocator.return_freed()
    try:
        code = _run(arguments)
    except (SurgeryError, OSError, MemoryError, RuntimeError) as error:
        expected = isinstance(error, (SurgeryError, OSError)) or _lacks_memory(error)
        if not expected or os.environ.get(output.DEBUG) == "1":
            raise
        known = as_surgery_error(error)
        if processes.speaks():
            output.failure(known)
        code = known.exit_code
    finally:
        processes.leave()
    sys.exit(code)
