"""Bases under which LoX does something else, as a command: `python -m benchmarks.evidence.bases KIND BASE ALIGNED`.

LoX sees a base only in `delta = aligned - base`. With another delta in its place, `aligned - delta'` is a base under
which `surgery lox` and `surgery sweep lox`, as they are, extrapolate delta'. Two kinds, made in float32:

tapered  `delta' = w(depth) delta`: an alpha of its own for each layer, alpha times w, which goes in straight lines
         between the weights given, spread evenly over the depth. What is in no layer keeps its delta.
cleaned  `delta' = delta (I - Q Q^T)`: Q spans what a matrix gets as input on innocent requests, the look-alikes of
         harmful ones among them, so that the edit leaves its output there alone. Only matrices of linear layers; all
         other tensors get delta' = 0.

Q holds the first eigenvectors of the inputs' second moment (not centred: what is to be left alone is the output, not
its spread), as many as carry the given share of the energy.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.real_pair import alignment

_WEIGHTS = "model.safetensors"
# Tokens of a row, and of all rows: twenty times the widest matrix of the models this is for would tell no more.
_LONGEST, _ROWS = 64, 200
_LAYER = re.compile(r"\.layers\.(\d+)\.")

Tensors = dict[str, Tensor]


def tapered(base: Tensors, aligned: Tensors, weights: Sequence[float]) -> Tensors:
    """Each layer's delta times its weight.

    Args:
        base: Tensors by name, any float dtype.
        aligned: Tensors of the same names and shapes.
        weights: From the first layer to the last, at least one, 0 or more.

    Returns:
        The base's place taker, float32.
    """
    depth = 1 + max(int(found[1]) for found in map(_LAYER.search, base) if found)
    made = {}
    for name, tensor in aligned.items():
        found = _LAYER.search(name)
        weight = _at(weights, int(found[1]) / max(depth - 1, 1)) if found else 1.0
        made[name] = tensor.float() - weight * (tensor.float() - base[name].float())
    return made


def _at(weights: Sequence[float], place: float) -> float:
    """The value at a place from 0 to 1 of straight lines between weights spread evenly."""
    along = place * (len(weights) - 1)
    before = min(int(along), max(len(weights) - 2, 0))
    after = min(before + 1, len(weights) - 1)
    return weights[before] + (along - before) * (weights[after] - weights[before])


def cleaned(base: Tensors, aligned: Tensors, moments: Mapping[str, Tensor], share: float) -> Tensors:
    """Each linear layer's delta without what it does to inputs like those that the moments are of.

    Args:
        base: Tensors by name, any float dtype.
        aligned: Tensors of the same names and shapes.
        moments: By a weight's name the sum of x x^T over its inputs x, (in, in).
        share: Of the inputs' energy that Q carries, 0 to 1.

    Returns:
        The base's place taker, float32.
    """
    made = {name: tensor.float().clone() for name, tensor in aligned.items()}
    for name, moment in moments.items():
        delta = aligned[name].double() - base[name].double()
        spared = leading(moment, share)
        made[name] = (aligned[name].double() - (delta - (delta @ spared) @ spared.T)).float()
    return made


def leading(moment: Tensor, share: float) -> Tensor:
    """The fewest eigenvectors of a second moment that carry this share of its trace: (in, m), float64."""
    values, vectors = torch.linalg.eigh(moment.double())
    energy = values.flip(0).clamp_min(0).cumsum(0) / values.clamp_min(0).sum()
    count = 0 if share <= 0 else int((energy < share).sum()) + 1
    return vectors.flip(1)[:, :count]


@torch.no_grad()
def second_moments(model: Any, tokenizer: Any, rows: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """The sum of x x^T over the inputs of every linear layer on rows, by the name of its weight: float32.

    A head that is tied to the embedding is left out: its matrix is the embedding's.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def note(module: Any, inputs: tuple[Tensor, ...]) -> None:
            given = inputs[0].reshape(-1, module.in_features).float()
            found[name] = found.get(name, 0) + given.T @ given

        return note

    head = model.get_output_embeddings()
    parts = [
        (f"{name}.weight", module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in parts]
    try:
        for row in rows:
            ids, _ = alignment.encode(tokenizer, row, _LONGEST)
            model(input_ids=torch.tensor([ids]))
    finally:
        for handle in handles:
            handle.remove()
    return found


def write(folder: Path, tensors: Tensors, like: Path) -> None:
    """A checkpoint with these tensors and the other files of one like it."""
    folder.mkdir(parents=True)
    for file in like.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _WEIGHTS, {"format": "pt"}
    )


def _read(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["prompt"], row["response"]) for row in rows][:_ROWS]


def main() -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("tapered", "cleaned"))
    parser.add_argument("base", type=Path)
    parser.add_argument("aligned", type=Path)
    parser.add_argument(
        "--weights", default="1", help="of tapered: from the first layer to the last, as 1:0.5:0"
    )
    parser.add_argument(
        "--share", type=float, default=0.9, help="of cleaned: of the energy of innocent inputs"
    )
    parser.add_argument("--innocent-data", type=Path, help="of cleaned: rows of prompt and response, .jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    base, aligned = (load_file(folder / _WEIGHTS) for folder in (asked.base, asked.aligned))
    if asked.kind == "tapered":
        made = tapered(base, aligned, [float(weight) for weight in asked.weights.split(":")])
    else:
        moments = second_moments(*alignment.read_model(asked.aligned), _read(asked.innocent_data))
        made = cleaned(base, aligned, moments, asked.share)
    write(asked.output, made, asked.aligned)
    return 0


if __name__ == "__main__":
    sys.exit(main())
