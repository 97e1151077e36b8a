"""The commands of methods that train: `surgery vaccine MODEL --aligned-data D`."""

import inspect
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.cli import commands, hub_options, output, training_output

if TYPE_CHECKING:
    from surgery.train.presets import Preset
    from surgery.train.step import TrainedMethod

_DATA = "a .jsonl, .json, .csv or .parquet file, ORG/DATASET[:SPLIT], demo:NAME; may be given again."
_SETS = {
    "aligned": "Requests with the answers an aligned model gives: ",
    "harmful": "Requests with the answers it must not learn: ",
    "retain": "Requests with the answers it must keep: ",
}
# Given, they say that an adapter is to be trained.
_ADAPTER = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "spare")
# Of the options of a run: reading order of a pair, and streaming, are no matters of one model that is loaded.
_NOT_HERE = ("stream", "allow_pickle", "i_checked_the_order")


def _options(method: "type[TrainedMethod]") -> list[tuple[str, Any, Any, list[str], str]]:
    """Options that are the command's own: name, type, default, flags, help."""
    data = [
        (f"{name}_data", list[str] | None, None, [f"--{name}-data"], _SETS[name] + _DATA)
        for name in method.data
    ]
    return [
        (
            "output",
            Path | None,
            None,
            ["--output", "-o"],
            "The folder to write; by default ./<model>-<method>.",
        ),
        *data,
        ("prompt_column", str | None, None, ["--prompt-column"], "The column of the prompts, if not prompt."),
        (
            "response_column",
            str | None,
            None,
            ["--response-column"],
            "The column of the responses, if not response.",
        ),
        (
            "preset",
            Literal["auto", "paper", "small"],
            "auto",
            ["--preset"],
            "Values of options not given; auto: small for demo: models and below 50 million parameters.",
        ),
        ("json", bool, False, ["--json"], "Print one JSON document on stdout."),
        ("quiet", bool, False, ["--quiet", "-q"], "Print nothing but errors and warnings."),
    ]


def _own(method: "type[TrainedMethod]") -> list[inspect.Parameter]:
    argument = typer.Argument(
        metavar="MODEL",
        help="The checkpoint to train: a folder, ORG/NAME[@REV], demo:aligned.",
        show_default=False,
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter("context", kind, annotation=typer.Context),
        inspect.Parameter("model", kind, annotation=Annotated[str, argument]),
        *(
            inspect.Parameter(
                name,
                kind,
                default=default,
                annotation=Annotated[shape, typer.Option(*flags, help=text, show_default=name == "preset")],
            )
            for name, shape, default, flags, text in _options(method)
        ),
    ]


def command(method: "type[TrainedMethod]") -> Any:
    """The callback of a method's command, its options made from three records."""
    from surgery.options import Options
    from surgery.train import presets
    from surgery.train.training import Training

    usual = presets.defaults(method, "paper")
    parameters = [
        *_own(method),
        *commands.parameters(method, f"{method.title} options", usual),
        *commands.parameters(Training, "Training options", usual),
        *commands.parameters(Options, "Run options", leave_out=_NOT_HERE),
        *hub_options.parameters(),
    ]
    doc = commands.help_text(method)
    return commands.with_signature(lambda values: _run(method, values), parameters, doc)


def _given(context: Any, names: set[str]) -> set[str]:
    """Those of the options that stand on the command line."""
    return {name for name in names if context.get_parameter_source(name).name != "DEFAULT"}


def _run(method: "type[TrainedMethod]", values: dict[str, Any]) -> None:
    """Train, merge, and print what came of it."""
    from surgery.options import Options
    from surgery.train import presets
    from surgery.train.running import immunise
    from surgery.train.sources import Columns

    commands.settle_output(values)
    hub_options.check(values)
    chosen = preset(values)
    names = _given(values["context"], set(presets.defaults(method, chosen)))
    given = {name: values[name] for name in names}
    if method.whole and not names & {"full", *_ADAPTER} and not values["as_lora"]:
        given["full"] = _whole(values)
    record, training = presets.from_preset(method, chosen, given)
    if not values["quiet"]:
        training_output.preset(chosen, record, training)
    done = immunise(
        record,
        model=values["model"],
        data={name: values[f"{name}_data"] for name in method.data if values[f"{name}_data"]},
        output=values["output"],
        training=training,
        options=commands.from_fields(Options, values),
        columns=Columns(values["prompt_column"], values["response_column"]),
        progress=None if values["quiet"] else training_output.progress,
        merging=None if values["quiet"] else training_output.shard,
    )
    if not (values["json"] or values["quiet"]):
        training_output.outcome(done)
    training_output.warnings(done)
    sent = hub_options.pushed(values, done.output)
    if values["json"]:
        output.document({**done.document(), **({"push": sent.document()} if sent else {})})
    elif sent and not values["quiet"]:
        hub_options.show(sent)


def preset(values: dict[str, Any]) -> "Preset":
    """The preset asked for, or the one that fits the model's size."""
    from surgery.train import presets

    if values["preset"] != "auto":
        return values["preset"]
    return presets.fitting(values["model"], _parameters(values["model"]))


def _whole(values: dict[str, Any]) -> bool:
    """Whether all weights are trained by a method that is meant to, as far as memory goes."""
    from surgery.train import presets

    count = _parameters(values["model"])
    fits = presets.whole_fits(count)
    if not fits and not values["quiet"]:
        output.note(
            f"all {count / 1e9:.1f} billion weights need more memory than there is: an adapter is trained"
        )
    return fits


def _parameters(model: str) -> int:
    """How many weights the model's files hold."""
    from surgery.hub import resolve
    from surgery.hub.remote import open_source

    checkpoint = open_source(resolve(model, weights="defer"))
    return sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
