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
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.evidence import moments
from benchmarks.real_pair import alignment
from surgery.train import sparing

_WEIGHTS = "model.safetensors"
# Innocent rows: ten thousand tokens, several times the widest matrix of the models this is for.
_ROWS = 200
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


def cleaned(base: Tensors, aligned: Tensors, inputs: Mapping[str, Tensor], share: float) -> Tensors:
    """Each linear layer's delta without what it does to inputs like those given.

    Args:
        base: Tensors by name, any float dtype.
        aligned: Tensors of the same names and shapes.
        inputs: By a weight's name the sum of x x^T over its inputs x, (in, in).
        share: Of the inputs' energy that Q carries, 0 to 1.

    Returns:
        The base's place taker, float32.
    """
    made = {name: tensor.float().clone() for name, tensor in aligned.items()}
    for name, moment in inputs.items():
        delta = aligned[name].double() - base[name].double()
        spared = sparing.carrying(moment, share)
        made[name] = (aligned[name].double() - (delta - (delta @ spared) @ spared.T)).float()
    return made


def write(folder: Path, tensors: Tensors, like: Path) -> None:
    """A checkpoint with these tensors and the other files of one like it."""
    folder.mkdir(parents=True)
    for file in like.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _WEIGHTS, {"format": "pt"}
    )


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
        found = moments.second_moments(
            *alignment.read_model(asked.aligned), moments.rows_of(asked.innocent_data)[:_ROWS]
        )
        made = cleaned(base, aligned, found, asked.share)
    write(asked.output, made, asked.aligned)
    return 0


if __name__ == "__main__":
    sys.exit(main())
