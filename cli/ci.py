"""The whole way from a pair to a pull request: `surgery ci --config surgery.toml`.

Every stage is the command that a person would type, in a process of its own, with the same file of defaults.
"""

import hashlib
import json as documents
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgery.cli import configuring, output
from surgery.errors import UsageError

_STATE = "ci.json"


def _option(flags: str | tuple[str, ...], text: str) -> Any:
    return typer.Option(*([flags] if isinstance(flags, str) else flags), help=text, show_default=False)


@dataclass(frozen=True)
class _Request:
    """What is asked for, and the file with everything else about the stages."""

    method: str
    base: str | None
    model: str
    reference: str
    output: Path
    report: Path
    policy: Path | None
    push_to: str | None
    config: Path | None

    def edit(self) -> list[str]:
        """The command that writes the model."""
        sources = [self.model] if self.base is None else [self.base, self.model]
        return [self.method, *sources, "--output", str(self.output)]

    def measure(self) -> list[str]:
        """The command that measures it."""
        return ["evaluate", str(self.output), "--reference", self.reference, "--output", str(self.report)]

    def decide(self) -> list[str]:
        """The command that decides."""
        policy = [] if self.policy is None else ["--policy", str(self.policy)]
        return ["gate", self._found(), *policy, "--junit", str(self.report / "gate.xml")]

    def describe(self) -> list[str]:
        """The command that puts the measured figures into the card."""
        return ["card", str(self.output), "--report", self._found()]

    def publish(self) -> list[str]:
        """The command that sends it."""
        return ["push", str(self.output), str(self.push_to), "--json"]

    def stages(self) -> Iterator[tuple[str, Sequence[str]]]:
        """The commands in their order, by the names of their stages."""
        yield "edit", self.edit()
        yield "evaluate", self.measure()
        yield "gate", self.decide()
        if self.push_to is not None:
            yield "card", self.describe()
            yield "push", self.publish()

    def _found(self) -> str:
        return str(self.report / "report.json")

    def digest(self) -> str:
        """What the written model depends on, as far as a request says it."""
        start = f"{configuring.PREFIX}_{self.method.upper().replace('-', '_')}_"
        known = {
            "words": self.edit(),
            "file": dict(_tables(self.config).get(self.method, {})),
            "environment": {
                name: value for name, value in sorted(os.environ.items()) if name.startswith(start)
            },
        }
        return hashlib.sha256(documents.dumps(known, sort_keys=True).encode()).hexdigest()


def ci(
    context: typer.Context,
    model: Annotated[str | None, _option("--model", "The aligned checkpoint.")] = None,
    base: Annotated[str | None, _option("--base", "The checkpoint before alignment, for lox.")] = None,
    method: Annotated[str, typer.Option("--method", help="lox, or a method that trains.")] = "lox",
    reference: Annotated[
        str | None, _option("--reference", "The undefended model; by default the aligned one.")
    ] = None,
    written: Annotated[Path, typer.Option("--output", "-o", help="The folder for the model.")] = Path("out"),
    report: Annotated[Path, typer.Option("--report", help="The folder for the report.")] = Path("report"),
    policy: Annotated[
        Path | None, _option("--policy", "What the report is held to; or [gate] policy.")
    ] = None,
    push_to: Annotated[
        str | None, _option("--push-to", "ORG/NAME on the Hub; nothing is sent without it.")
    ] = None,
    until: Annotated[
        Literal["edit", "evaluate", "gate", "push"], typer.Option("--until", help="The last stage.")
    ] = "push",
    json: Annotated[bool, _option("--json", "Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, _option(("--quiet", "-q"), "Print nothing but errors and warnings.")] = False,
) -> None:
    """Edit, evaluate, hold to a policy, describe and push, all from one file.

    The file's [ci] table has these options, and the tables of the commands have theirs. Run again, it goes on with
    what is left; a gate that fails ends it with exit 1, before anything is sent.
    """
    if model is None:
        raise UsageError(
            "surgery ci needs a model; give --model, or model in the [ci] table of --config FILE"
        )
    if quiet and json:
        raise UsageError("--json and --quiet contradict each other; choose one")
    request = _Request(
        method, base, model, reference or model, written, report, policy, push_to, context.find_root().obj
    )
    _check(request, context.find_root())
    found = _carried_out(request, until, silent=json or quiet, quiet=quiet)
    if json:
        output.document(found)
    elif not quiet:
        output.rows([(name, str(value)) for name, value in found.items() if not isinstance(value, dict)])


def _check(request: _Request, top: Any) -> None:
    """Refuse what would fail after hours.

    Args:
        request: What is asked for.
        top: The context of the top level, with the file's tables.
    """
    from surgery import methods
    from surgery.gating import policy as policies
    from surgery.pushing.destination import Destination
    from surgery.train.step import TrainedMethod

    trains = issubclass(methods.get(request.method), TrainedMethod)
    if trains == (request.base is not None):
        wanted = (
            "takes one model: leave out base"
            if trains
            else "needs the checkpoint before alignment: give base"
        )
        raise UsageError(f"{request.method} {wanted}")
    if request.policy is None and "policy" not in _tables(request.config).get("gate", {}):
        raise UsageError("surgery ci needs a policy; give --policy, or policy in the [ci] or [gate] table")
    if request.push_to is not None:
        Destination(request.push_to).check()
    for name, words in request.stages():
        taken = _taken(words, top)
        if name == "gate":
            policies.read(taken["policy"])


def _taken(words: Sequence[str], top: Any) -> dict[str, Any]:
    """What a command would take its options as, from the words, the environment and the file; it does not run."""
    command = top.command.get_command(top, words[0])
    found: dict[str, Any] = command.make_context(words[0], [*words[1:]], parent=top).params
    return found


def _tables(config: Path | None) -> configuring.Tables:
    from surgery.cli.app import COMMANDS

    return {} if config is None else configuring.read(config, COMMANDS)


def _carried_out(request: _Request, until: str, *, silent: bool, quiet: bool) -> dict[str, Any]:
    """Run the stages up to the last one asked for; what they came to."""
    found: dict[str, Any] = {"output": str(request.output)}
    written = _is_written(request)
    for name, words in request.stages():
        if name == "edit" and written:
            # By this very request: checked in place of written again.
            words = ["verify", str(request.output)]
        stdout = _run(words, request.config, silent=silent or name == "push", quiet=quiet)
        if name == "edit":
            _remember(request)
            manifest = (request.output / "surgery.json").read_bytes()
            found["manifest_sha256"] = hashlib.sha256(manifest).hexdigest()
        elif name == "gate":
            found |= {"report": str(request.report), "gate": "pass"}
        elif name == "push":
            sent = documents.loads(stdout)
            found |= {key: sent[key] for key in ("repo", "revision", "commit", "pr_url")}
        if name == until:
            break
    _tell_github(found, request)
    return found


def _is_written(request: _Request) -> bool:
    """Whether the model is there already.

    Raises:
        UsageError: It is, and came of another request.
    """
    if not request.output.exists():
        return False
    try:
        known = documents.loads((request.report / _STATE).read_text(encoding="utf-8"))["edit"]
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    if known != request.digest():
        raise UsageError(
            f"{request.output} is there and was not made by this request; remove it, or name another --output"
        )
    return True


def _remember(request: _Request) -> None:
    from surgery.documents import write_json

    request.report.mkdir(parents=True, exist_ok=True)
    write_json(request.report / _STATE, {"edit": request.digest()})


def _run(words: Sequence[str], config: Path | None, *, silent: bool, quiet: bool) -> str:
    """Run a command in a process of its own; its stdout where it is to be silent.

    Args:
        words: Of the command.
        config: The file of defaults.
        silent: Whether its stdout is kept from the terminal.
        quiet: Whether it is to say nothing but errors and warnings.

    Raises:
        Exit: With its exit code, where that is not 0.
    """
    words = [*(["--config", str(config)] if config else []), *words]
    if not quiet:
        output.note(f"$ surgery {shlex.join(words)}")
    # A command that prints a document is not quiet: what it tells is shown if it fails.
    hushed = quiet and "--json" in words
    words = [*words, "--quiet"] if quiet and not hushed else words
    sys.stdout.flush()
    done = subprocess.run(
        [sys.executable, "-m", "surgery", *words],
        stdout=subprocess.PIPE if silent else None,
        stderr=subprocess.PIPE if hushed else None,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.stderr.write(done.stderr or "")
        raise typer.Exit(done.returncode)
    return done.stdout or ""


def _tell_github(found: Mapping[str, Any], request: _Request) -> None:
    """Append to GitHub's outputs and summary where it has set them; the gate has told its own part."""
    if outputs := os.environ.get("GITHUB_OUTPUT"):
        names = ("repo", "revision", "commit", "pr_url", "manifest_sha256")
        lines = [f"{name}={found[name]}" for name in names if found.get(name) is not None]
        _append(Path(outputs), "".join(line + "\n" for line in lines))
    if (summary := os.environ.get("GITHUB_STEP_SUMMARY")) and "gate" in found:
        pushed = (
            f"Pushed to {found['repo']}, {found['revision']} ({found['commit']}).\n"
            if "repo" in found
            else ""
        )
        _append(Path(summary), (request.report / "report.md").read_text(encoding="utf-8") + "\n" + pushed)


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
