"""LoX as its authors compute it, written afresh: both models in memory, a full SVD of every difference.

    python -m benchmarks.reference BASE ALIGNED OUTPUT

As in the published script, every parameter of two or more dimensions is edited, the difference is taken in the
models' own dtype, and the models are loaded and saved whole. Perin et al., "LoX", COLM 2025, arXiv 2506.15606.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import cores

RANK, ALPHA = 6, 1.5


def edit(aligned: Tensor, base: Tensor, rank: int = RANK, alpha: float = ALPHA) -> Tensor:
    """`aligned + alpha * U_k U_k^T delta`, by a full decomposition."""
    delta = (aligned - base).float()
    left = torch.linalg.svd(delta, full_matrices=False).U[:, :rank]
    return aligned + (alpha * (left @ (left.T @ delta))).to(aligned.dtype)


def edit_stage(aligned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of two or more dimensions edited."""
    return {
        name: edit(weight, base[name]) if weight.dim() >= 2 else weight for name, weight in aligned.items()
    }


def main(base: Path, aligned: Path, output: Path) -> None:
    """The whole computation, from two folders to a third."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(cores())
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (base, aligned)]
    before, after = (dict(model.named_parameters()) for model in models)
    with torch.no_grad():
        for name, weight in after.items():
            if weight.dim() >= 2:
                weight.copy_(edit(weight, before[name]))
    models[1].save_pretrained(output)


def timed_edit_stage(base: Path, aligned: Path) -> float:
    """Seconds of the edit stage alone, both checkpoints already in memory."""
    from safetensors.torch import load_file

    torch.set_num_threads(cores())
    sides = [
        {
            name: tensor
            for file in sorted(path.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for path in (aligned, base)
    ]
    begun = time.perf_counter()
    edit_stage(*sides)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
