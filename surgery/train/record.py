"""What is written down of a training run: for the manifest and card of its output, and for taking it up again."""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from surgery import __version__, provenance
from surgery.checkpoint.layout import Checkpoint
from surgery.hub import Source
from surgery.inputs import checkpoint_fingerprint
from surgery.options import Options
from surgery.train import presets
from surgery.train.crew import Crew
from surgery.train.data import DataSet
from surgery.train.sources import Columns
from surgery.train.step import TrainedMethod
from surgery.train.training import Training

# None of these changes what a run comes to.
_INERT = ("checkpoint_every", "keep_adapter", "track")


def default_output(method: TrainedMethod, source: Source) -> Path:
    """`./<model>-<method>` for a source of any kind."""
    name = source.repository.rpartition("/")[2] if source.repository else source.label
    return Path(re.sub(r"[^\w.-]+", "-", name) + f"-{method.name}")


def _settings(training: Training) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(training).items() if name not in _INERT}


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("transformers", "peft", "accelerate")}
    return {**provenance.versions(), **packages}


def fingerprint(
    method: TrainedMethod,
    source: Source,
    checkpoint: Checkpoint,
    sets: Mapping[str, DataSet],
    training: Training,
    options: Options,
    crew: Crew,
) -> dict[str, Any]:
    """What must be the same for another run to take up where this one stopped."""
    return {
        "version": _versions(),
        "method": method.name,
        "options": {**dataclasses.asdict(method), **_settings(training), "seed": options.seed},
        "threads": torch.get_num_threads(),
        "processes": [crew.world, crew.sharded],
        "device": crew.device.type,
        "model": checkpoint_fingerprint(checkpoint, source),
        "data": {name: data_set.document() for name, data_set in sets.items()},
    }


def trained(
    method: TrainedMethod,
    source: Source,
    sets: Mapping[str, DataSet],
    training: Training,
    options: Options,
    columns: Columns,
    crew: Crew,
    history: Sequence[Mapping[str, float]],
    spared: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """How an output came to be: method, hyperparameters, data, seed, losses, and the command that repeats it."""
    return {
        "method": method.name,
        "title": method.title,
        "paper": method.paper,
        "equation": method.equation(),
        "hyperparameters": dataclasses.asdict(method),
        "training": {**_settings(training), "processes": crew.world, "device": crew.device.type},
        "data": {name: data_set.document() for name, data_set in sets.items()},
        "seed": options.seed,
        "versions": _versions(),
        "losses": {"first": dict(history[0]), "last": dict(history[-1])},
        **({"spared": dict(spared)} if spared else {}),
        "command": command(method, source, sets, training, options, columns),
    }


def command(
    method: TrainedMethod,
    source: Source,
    sets: Mapping[str, DataSet],
    training: Training,
    options: Options,
    columns: Columns,
) -> list[str]:
    """The words of a command that repeats the run; files by their names alone."""
    usual = presets.defaults(type(method), "paper")
    values = {**dataclasses.asdict(method), **_settings(training)}
    words = [method.name, source.label]
    for name, data_set in sets.items():
        for identity in data_set.sources:
            words += [f"--{name}-data", identity.source]
    words += ["--preset", "paper"]
    for name, value in {**values, "seed": options.seed, **_named(columns)}.items():
        if value == usual.get(name) or value is None or value is False:
            continue
        words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return words


def _named(columns: Columns) -> dict[str, str | None]:
    return {"prompt_column": columns.prompt, "response_column": columns.response}


def notes(sets: Mapping[str, DataSet], training: Training) -> tuple[str, ...]:
    """What a careful user should know of the data, a line each."""
    found = []
    for name, data_set in sets.items():
        if data_set.dropped:
            found.append(
                f"{data_set.dropped} rows of the {name} data are left out: their prompt alone has "
                f"{training.max_length} tokens or more (--max-length)"
            )
        if data_set.cut:
            found.append(
                f"{data_set.cut} responses of the {name} data are cut at {training.max_length} tokens (--max-length)"
            )
    return tuple(found)


def manifest(told: Mapping[str, Any], folder: Path) -> bytes:
    """`surgery.json` of an adapter that is kept: how it came to be, and the SHA-256 of its files."""
    files = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".json") and not file.name.startswith(("journal", "surgery"))
    }
    document = {"surgery": __version__, "kind": "adapter", "trained": dict(told), "files": files}
    return json.dumps(document, indent=2).encode() + b"\n"
