"""What the matrices of a model are given as input on some rows, as second moments."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_pair import alignment

# Tokens of a row.
_LONGEST = 64

Rows = Sequence[tuple[str, str]]


def rows_of(path: Path) -> Rows:
    """The prompts and responses of a .jsonl file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["prompt"], row["response"]) for row in rows]


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
