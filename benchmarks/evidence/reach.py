"""What an edit does to harmful and to innocent inputs: `python -m benchmarks.evidence.reach ALIGNED EDITED`.

Of each matrix W of a linear layer and its edit E = W_edited - W_aligned, with x what the aligned model gives it on
some rows (prompt and answer, all tokens), the change `mean |E x|^2 / mean |W x|^2`, from the inputs' second moments.
Two figures say where it goes: how many times as large it is on harmful requests, refused, as on innocent ones; and
how much of it on innocent ones goes through the few directions that carry half of their inputs' energy.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.evidence import moments
from benchmarks.evidence.moments import Rows
from benchmarks.real_pair import alignment
from surgery.train import sparing

FILE = "reach.json"
# Rows of each kind: six thousand tokens.
_ROWS = 100
# Of the energy of innocent inputs, what the leading directions carry.
_HALF = 0.5


def energy(matrix: Tensor, moment: Tensor) -> float:
    """The sum of |matrix x|^2 over inputs with this second moment, float64."""
    wide = matrix.double()
    return float(((wide @ moment.double()) * wide).sum())


def reached(edit: Tensor, weight: Tensor, harmful: Tensor, innocent: Tensor) -> dict[str, float]:
    """What the edit of one matrix reaches.

    Args:
        edit: (out, in), not zero.
        weight: The matrix before it.
        harmful: Second moment of its inputs on harmful rows, (in, in).
        innocent: The same on innocent rows.

    Returns:
        `change` on innocent inputs, relative; `selectivity`, the change on harmful inputs in times of that; `shared`,
        the part of the edit's energy on innocent inputs that goes through the `directions` (a share of all) which
        carry half of these inputs' energy.
    """
    leading = sparing.carrying(innocent, _HALF)
    through = (edit.double() @ leading) @ leading.T
    changes = [energy(edit, moment) / energy(weight, moment) for moment in (harmful, innocent)]
    return {
        "change": changes[1],
        "selectivity": changes[0] / changes[1],
        "shared": energy(through, innocent) / energy(edit, innocent),
        "directions": leading.shape[1] / len(leading),
    }


def _each(aligned: Path, edited: Path, harmful: Rows, innocent: Rows) -> Iterator[dict[str, float]]:
    """`reached` of every matrix that was edited."""
    model, tokenizer = alignment.read_model(aligned)
    inputs = [moments.second_moments(model, tokenizer, rows[:_ROWS]) for rows in (harmful, innocent)]
    before, after = (load_file(folder / "model.safetensors") for folder in (aligned, edited))
    for name in inputs[0]:
        edit = after[name].float() - before[name].float()
        if edit.any():
            yield reached(edit, before[name], inputs[0][name], inputs[1][name])


def quartiles(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Of each figure the median over matrices with the quartiles around it, and how many matrices there are."""
    told: dict[str, Any] = {"n": len(found)}
    for name in found[0]:
        low, middle, high = statistics.quantiles([one[name] for one in found], n=4, method="inclusive")
        told[name] = {"value": middle, "low": low, "high": high}
    return told


def main() -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("aligned", type=Path)
    parser.add_argument("edited", type=Path)
    parser.add_argument(
        "--aligned-data",
        type=Path,
        required=True,
        help="the defender's rows: the innocent ones, and refusals",
    )
    parser.add_argument("--innocent-data", type=Path, required=True, help="the innocent ones, .jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    innocent = moments.rows_of(asked.innocent_data)
    harmful = [row for row in moments.rows_of(asked.aligned_data) if row not in innocent]
    found = [*_each(asked.aligned, asked.edited, harmful, innocent)]
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / FILE).write_text(json.dumps(quartiles(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
