"""What training all weights changed, tensor by tensor, as a file: the trained weight less the stored one, float32."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery.adapter_names import Names, Place, build_model
from surgery.checkpoint.header import build_header
from surgery.checkpoint.layout import Checkpoint
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.writer import ShardFile
from surgery.editing import as_bytes
from surgery.errors import InputError
from surgery.train.network import whole

DELTAS = "delta.safetensors"


def write_deltas(model: nn.Module, checkpoint: Checkpoint, folder: Path, *, write: bool = True) -> None:
    """Write `delta.safetensors` into `folder`: of every trained tensor of the checkpoint's files, by its name there.

    One tensor is in memory at a time. All processes call this; the one with `write` does.

    Raises:
        InputError: A trained weight is in no file of the checkpoint, or lies there in a layout that is not known.
    """
    weights = {
        name: weight
        for name, weight in model.named_parameters(remove_duplicate=False)
        if weight.requires_grad
    }
    places = _places(checkpoint, weights)
    shapes = [(name, checkpoint.tensors[name].shape) for name in places]
    described = [(name, "F32", shape, 4 * torch.Size(shape).numel()) for name, shape in shapes]
    changes = _changes(places, weights, checkpoint)
    if not write:
        for _ in changes:
            pass
        return
    header = build_header(described, {"format": "pt"})
    size = len(header) + sum(nbytes for *_, nbytes in described)
    with ShardFile(folder / DELTAS, header, size) as file:
        for change in changes:
            file.write(as_bytes(change))
        file.close()


def _places(checkpoint: Checkpoint, weights: dict[str, nn.Parameter]) -> dict[str, Place]:
    """Where each tensor of the files lies in the model, those apart that were not trained."""
    names = Names(checkpoint.tensors, build_model(checkpoint))
    found = {name: names.place(name) for name in checkpoint.tensors}
    places = {name: place for name, place in found.items() if place and place.parameter in weights}
    held = {id(weights[place.parameter]) for place in places.values()}
    if lost := [name for name, weight in weights.items() if id(weight) not in held]:
        raise InputError(
            f"{lost[0]} was trained and is in no file of {checkpoint.label}; complete the checkpoint"
        )
    return places


def _changes(
    places: dict[str, Place], weights: dict[str, nn.Parameter], checkpoint: Checkpoint
) -> Iterator[Tensor]:
    """The change of each tensor in turn; parts of one parameter follow each other or cost its gathering again."""
    held, value = "", torch.empty(0)
    with Reader(checkpoint) as reader:
        for name, place in places.items():
            if place.parameter != held:
                held, value = place.parameter, whole(weights[place.parameter])
            stored = reader.read(name).float()
            part = value if place.expert is None else value[place.expert]
            if not place.whole:
                part = part[place.row : place.row + stored.shape[0]]
            yield part.float() - stored
