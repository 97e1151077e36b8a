"""What the commands that measure a model have in common: its data, the judge, where the result goes."""

import inspect
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from surgery.cli import output

Option = tuple[str, Any, Any, list[str], str]
"""Name, type, default, flags, help."""

_FORMS = " A .jsonl, .json, .csv or .parquet file, ORG/DATASET[:SPLIT], demo:NAME; may be given again."
DATA: list[Option] = [
    ("harmful_data", list[str] | None, None, ["--harmful-data"], "Requests with compliant answers." + _FORMS),
    ("held_out_data", list[str] | None, None, ["--held-out-data"],
     "Such rows to measure on; by default a fifth of the harmful ones."),
    ("held_out_refusals", list[str] | None, None, ["--held-out-refusals"],
     "The requests of the held-out rows, refused; by default in words of our own."),
    ("refusals_data", list[str] | None, None, ["--refusals-data"], "Refused requests, for attacks that need them."),
    ("benign_data", list[str] | None, None, ["--benign-data"], "Innocent requests with answers."),
    ("prompt_column", str | None, None, ["--prompt-column"], "The column of the prompts, if not prompt."),
    ("response_column", str | None, None, ["--response-column"], "The column of the responses, if not response."),
]  # fmt: skip
JUDGE: list[Option] = [
    ("judge", str | None, None, ["--judge"],
     "keywords, answers, prefixes, strongreject, harmbench or endpoint; by default the one that fits the data."),
    ("judge_model", str | None, None, ["--judge-model"],
     "Weights of strongreject or harmbench, a folder or ORG/NAME[@REV]; or the endpoint's name for its model."),
    ("judge_url", str | None, None, ["--judge-url"],
     "An OpenAI-compatible endpoint, as http://127.0.0.1:8000/v1; its key is taken from SURGERY_JUDGE_KEY."),
]  # fmt: skip
PRINTED: list[Option] = [
    ("json", bool, False, ["--json"], "Print one JSON document on stdout."),
    ("quiet", bool, False, ["--quiet", "-q"], "Print nothing but errors and warnings."),
]
SHARED: list[Option] = [
    ("seed", int, 0, ["--seed"], "Of everything drawn that has no seed of its own."),
    ("device", str, "auto", ["--device"], "auto, cpu, cuda or cuda:N."),
    *PRINTED,
]
_FILE = " A .jsonl, .json, .csv or .parquet file, ORG/DATASET[:SPLIT], demo:NAME."
MATERIALS: list[Option] = [
    ("utility_data", list[str] | None, None, ["--utility-data"],
     "Innocent requests with answers: perplexity, KL, choices." + _FILE),
    ("look_alikes_data", list[str] | None, None, ["--look-alikes-data"],
     "Innocent requests that look harmful: over-refusal." + _FILE),
    ("text", list[str] | None, None, ["--text"], "A text file for perplexity, in place of the utility rows."),
    ("choices", list[str] | None, None, ["--choices"],
     "Multiple-choice questions: lines of question, choices, answer; by default made from the utility rows."),
    ("practice_data", list[str] | None, None, ["--practice-data"], "Rows of a benign task to learn." + _FILE),
    ("cross_data", list[str] | None, None, ["--cross-data"], "Harmful rows of another domain to attack with."),
    ("cross_held_out", list[str] | None, None, ["--cross-held-out"], "Harmful rows to measure that attack on."),
]  # fmt: skip
_MATERIALS = {
    "utility_data": "utility",
    "look_alikes_data": "look_alikes",
    "text": "text",
    "choices": "choices",
    "practice_data": "practice",
    "cross_data": "cross",
    "cross_held_out": "cross_held_out",
}
# The sets of `surgery.attacking.ground` by the options that give them.
_SETS = {
    "harmful_data": "harmful",
    "held_out_data": "held_out",
    "held_out_refusals": "held_out_refusals",
    "refusals_data": "refusals",
    "benign_data": "benign",
}


def arguments(text: str, name: str = "model") -> list[inspect.Parameter]:
    """The model as the one argument."""
    info = typer.Argument(metavar=name.upper(), help=text, show_default=False)
    return [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, info])]


def options(listed: list[Option], panel: str | None = None) -> list[inspect.Parameter]:
    """Parameters as Typer wants them."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[
                kind,
                typer.Option(
                    *flags, help=text, show_default=default not in (None, False), rich_help_panel=panel
                ),
            ],
        )
        for name, kind, default, flags, text in listed
    ]


def data(values: dict[str, Any]) -> dict[str, list[str]]:
    """The data sets that were given."""
    return {name: values[option] for option, name in _SETS.items() if values[option]}


def judge(values: dict[str, Any]) -> Any:
    """The judge asked for."""
    from surgery.judging.choice import Choice

    return Choice(values["judge"], values["judge_model"], values["judge_url"])


def materials(values: dict[str, Any]) -> dict[str, list[str]]:
    """The data of utility that was given."""
    return {name: values[option] for option, name in _MATERIALS.items() if values[option]}


def optional(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """The same options, none of which has a default of its own."""
    return [
        parameter.replace(default=None, annotation=_or_none(parameter.annotation)) for parameter in parameters
    ]


def _or_none(annotation: Any) -> Any:
    kind, info = get_args(annotation)
    return Annotated[kind | None, info]


def named(values: dict[str, Any], verb: str) -> Path:
    """The output folder: the one asked for, or `./<model>-<verb>`."""
    from surgery.hub import resolve
    from surgery.job import default_output

    given = values["output"]
    return Path(given) if given else default_output(resolve(values["model"], weights="defer"), verb)


def progress(done: int, total: int, text: str) -> None:
    """One line for each trial."""
    output.note(f"[{done}/{total}] {text}")


def trial(done: int, total: int, measured: Any) -> None:
    """One line for each trial of a sweep."""
    from surgery.sweeping.labels import label

    failed = f": failed, {measured.error}" if measured.error else ""
    progress(done, total, f"{label(measured.params)}{failed}")
