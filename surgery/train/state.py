"""What of a run is on disk: a folder for every state saved, whole or not there, and the last of them taken up again.

A state of an adapter is itself a PEFT adapter, so that it can be merged when the run was stopped for good.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgery.checkpoint.staging import fsync_folder, writing
from surgery.errors import InputError
from surgery.train.network import adapter_config, carried, is_adapted, whole
from surgery.train.spreading import placed_like

ADAPTER = "adapter_model.safetensors"
WEIGHTS = "weights.safetensors"
_REST = "rest.pt"
_STATE = "state-"


@dataclass
class Position:
    """Where a run stands, beside its weights.

    Attributes:
        done: Steps taken.
        memory: What the method carries from step to step.
        history: The terms of the loss at every step taken.
    """

    done: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def save_weights(model: nn.Module, folder: Path, label: str, *, write: bool = True) -> None:
    """Write what the run changes into an existing folder, as a PEFT adapter or as `weights.safetensors`, durably.

    All processes call this; the one with `write` does.
    """
    tensors = {name: whole(weight) for name, weight in carried(model).items()}
    if not write:
        return
    file = folder / (ADAPTER if is_adapted(model) else WEIGHTS)
    with writing(file):
        save_file(tensors, file, metadata={"format": "pt"})
        _sync(file)
        if is_adapted(model):
            config = folder / "adapter_config.json"
            config.write_text(json.dumps(adapter_config(model, label), indent=2, sort_keys=True) + "\n")
            _sync(config)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give what the run changes the values saved in `folder`.

    Raises:
        InputError: The folder holds other tensors than the model.
    """
    found = load_file(folder / (ADAPTER if is_adapted(model) else WEIGHTS))
    own = carried(model)
    if differing := sorted(found.keys() ^ own.keys()):
        raise InputError(
            f"{folder} was saved from another model, which differs in {differing[0]}; remove the folder"
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(placed_like(found[name], weight))


class States:
    """The states of a run in its work folder, `folder`.

    Args:
        folder: The work folder, which exists.
        label: The model's name for adapters' configuration.
        writes: Whether this process writes; the others only take part.
    """

    def __init__(self, folder: Path, label: str, *, writes: bool = True) -> None:
        self.folder, self._label, self._writes = folder, label, writes

    def last(self) -> Path | None:
        """The last state that is whole; None where there is none."""
        found = sorted(self.folder.glob(f"{_STATE}*[0-9]"))
        return found[-1] if found else None

    def save(self, model: nn.Module, optimiser: torch.optim.Optimizer, position: Position) -> None:
        """Add a state; it takes its name when it is on disk, and only then the one before it is removed."""
        target = self.folder / f"{_STATE}{position.done:08d}"
        building = target.with_suffix(".partial")
        if self._writes:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
        save_weights(model, building, self._label, write=self._writes)
        rest = {"optimiser": _gathered(optimiser.state_dict()), **vars(position)}
        if not self._writes:
            return
        with writing(building / _REST):
            torch.save(rest, building / _REST)
            _sync(building / _REST)
        before = self.last()
        fsync_folder(building)
        os.replace(building, target)
        fsync_folder(self.folder)
        if before is not None:
            shutil.rmtree(before)

    def clear(self) -> None:
        """Remove every state: the run is over."""
        for folder in self.folder.glob(f"{_STATE}*"):
            shutil.rmtree(folder)

    def resume(self, model: nn.Module) -> tuple[Position, Mapping[str, Any] | None]:
        """Take up the last state: the model's weights are set; returns position and state of the optimiser."""
        folder = self.last()
        if folder is None:
            return Position(), None
        load_weights(model, folder)
        rest = torch.load(folder / _REST, map_location="cpu", weights_only=True)
        optimiser = rest.pop("optimiser")
        return Position(**rest), optimiser


def _gathered(value: Any) -> Any:
    """A copy of nested state with every tensor whole and on the CPU."""
    if isinstance(value, Tensor):
        return whole(value)
    if isinstance(value, dict):
        return {key: _gathered(inner) for key, inner in value.items()}
    return [_gathered(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def spread_like(state: Mapping[str, Any], weights: list[nn.Parameter]) -> dict[str, Any]:
    """An optimiser's state as saved, its tensors cut as FSDP cut the weights they belong to."""

    def cut(value: Any, weight: nn.Parameter) -> Any:
        return (
            placed_like(value, weight) if isinstance(value, Tensor) and value.shape == weight.shape else value
        )

    inner = {
        number: {key: cut(value, weights[number]) for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": inner}
