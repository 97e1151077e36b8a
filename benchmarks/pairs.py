"""Synthetic pairs of checkpoints: Llama shapes in bfloat16, aligned and base apart by a known kind of update.

    python -m benchmarks.pairs FOLDER --size 1.1B --kind spiked --ratio 1e-2

Kinds of the update of a matrix (m, n), its norm `ratio` times that of the weight:

* spiked: 8 singular values from 1.1 to 4 times the edge sqrt(m) + sqrt(n) of a Gaussian bulk;
* bulk: Gaussian entries with rows and columns of uneven size (powers of their place, -0.2): singular values
  that fall slowly and leave no gap at the rank, the first six holding 2 to 8 % of the energy, as real updates do;
* noise: Gaussian entries alone, the hardest case: the values at the edge differ by their spacing only.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SPIKES, WEAKEST, STRONGEST, FALL = 8, 1.1, 4.0, -0.2
SHARD_BYTES = 1 << 29


@dataclass(frozen=True)
class Shape:
    """A Llama model's sizes; tied models have no head of their own."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the file."""
        hidden, inner = self.hidden, self.intermediate
        narrow = hidden // self.heads * self.key_value_heads
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, hidden)
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (hidden,)
            yield prefix + "mlp.down_proj.weight", (hidden, inner)
            yield prefix + "mlp.gate_proj.weight", (inner, hidden)
            yield prefix + "mlp.up_proj.weight", (inner, hidden)
            yield prefix + "post_attention_layernorm.weight", (hidden,)
            yield prefix + "self_attn.k_proj.weight", (narrow, hidden)
            yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
            yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
            yield prefix + "self_attn.v_proj.weight", (narrow, hidden)
        yield "model.norm.weight", (hidden,)

    def parameters(self) -> int:
        """Entries of all tensors."""
        return sum(torch.Size(shape).numel() for _, shape in self.tensors())


SIZES = {
    "135M": Shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "0.3B": Shape(1024, 2816, 20, 16, 8, 32000, tied=False),
    "1.1B": Shape(2048, 5632, 22, 32, 4, 32000, tied=False),
    "1.1B-twice": Shape(2048, 5632, 44, 32, 4, 32000, tied=False),
    "2B": Shape(2560, 6912, 26, 20, 4, 32000, tied=False),
}
"""The shapes that are timed: SmolLM2-135M's, TinyLlama-1.1B's, and two between and beyond."""


def update(kind: str, m: int, n: int, generator: torch.Generator) -> Tensor:
    """An update of the kind, float32, its scale arbitrary."""
    delta = torch.randn(m, n, generator=generator)
    if kind == "spiked":
        strengths = torch.linspace(STRONGEST, WEAKEST, SPIKES) * (m**0.5 + n**0.5)
        left, right = (torch.linalg.qr(torch.randn(side, SPIKES, generator=generator)).Q for side in (m, n))
        delta.addmm_(left * strengths, right.mT)
    if kind == "bulk":
        for axis, side in enumerate((m, n)):
            sizes = torch.arange(1, side + 1).float().pow(FALL)[torch.randperm(side, generator=generator)]
            delta.mul_(sizes.unsqueeze(1 - axis))
    return delta


def write_pair(folder: Path, size: str, kind: str, ratio: float, seed: int = 0) -> tuple[Path, Path]:
    """Write `folder/base` and `folder/aligned` unless they are there, and return both paths."""
    shape, generator = SIZES[size], torch.Generator().manual_seed(seed)
    paths = folder / "base", folder / "aligned"
    if all((path / "config.json").is_file() for path in paths):
        return paths
    weights: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for name, sides in shape.tensors():
        aligned = torch.randn(sides, generator=generator).mul_(0.02).bfloat16()
        weights[0][name] = weights[1][name] = aligned
        if len(sides) == 2:
            delta = update(kind, *sides, generator)
            delta.mul_(ratio * torch.linalg.vector_norm(aligned.float()) / torch.linalg.vector_norm(delta))
            weights[0][name] = (aligned.float() - delta).bfloat16()
    for path, tensors in zip(paths, weights, strict=True):
        path.mkdir(parents=True, exist_ok=True)
        _write(path, tensors)
        (path / "config.json").write_text(json.dumps(_config(shape)))
    return paths


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write shards of at most half a gigabyte with their index, as models are published."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(one.nbytes for one in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, path / file, {"format": "pt"})
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.1B")
    parser.add_argument("--kind", choices=("spiked", "bulk", "noise"), default="spiked")
    parser.add_argument("--ratio", type=float, default=1e-2)
    options = parser.parse_args()
    write_pair(options.folder, options.size, options.kind, options.ratio)
