"""Tiny checkpoints for tests of this package and of methods written outside it; no downloads.

Models are made from a config with random weights and saved as transformers saves them, then tensors are
perturbed in the files, as an alignment would.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_SMALL, "tie_word_embeddings": False},
    "llama-tied": {**_SMALL, "model_type": "llama", "tie_word_embeddings": True},
    "gpt2": {"vocab_size": 128, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "bos_token_id": 0, "eos_token_id": 1},
    "mixtral": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_SMALL, **_MOE, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_SMALL, **_MOE, "head_dim": 12},
}  # fmt: skip
"""Configs by name; a name is the transformers model type unless the config gives another."""


def tiny_model(
    folder: Path, architecture: str = "llama", *, seed: int = 0, shard_size: str = "5GB", fused: bool = False
) -> Path:
    """A folder with a random model of that architecture, in bfloat16, and its config; returns the folder.

    Args:
        folder: Where it goes.
        architecture: A name in `ARCHITECTURES`.
        seed: Of the weights.
        shard_size: Largest shard, as transformers spells it.
        fused: Store tensors as they are in memory (experts as one 3-D tensor), not as transformers saves them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(ARCHITECTURES[architecture])
    config = AutoConfig.for_model(settings.pop("model_type", architecture), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard_size)
    if fused:
        for file in folder.glob("model*.safetensors*"):
            file.unlink()
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, shards: int = 1
) -> Path:
    """A folder with these tensors in their order, in one file or in shards with an index; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata=metadata)
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata=metadata)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, by name."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def aligned_like(tensor: Tensor, generator: torch.Generator, *, size: float = 2e-3) -> Tensor:
    """The tensor after a made-up alignment: a few strong directions over noise, `size` times its own norm."""
    if not tensor.is_floating_point():
        return tensor
    change = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim >= 2:
        left = torch.randn(*tensor.shape[:-1], 3, generator=generator)
        right = torch.randn(*tensor.shape[:-2], 3, tensor.shape[-1], generator=generator)
        change = change + 3 * left @ right
    norm = torch.linalg.vector_norm(tensor.float()).clamp(min=1e-3)
    change = change * (size * norm / torch.linalg.vector_norm(change))
    return (tensor.float() + change).to(tensor.dtype)


def perturbed_copy(
    source: Path,
    target: Path,
    *,
    seed: int = 1,
    change: Callable[[Tensor, torch.Generator], Tensor] = aligned_like,
) -> Path:
    """A copy of a checkpoint folder in which every floating tensor is changed, shard names kept; returns it."""
    target.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(source.iterdir()):
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
            continue
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = {name: change(tensor, generator) for name, tensor in load_file(file).items()}
        save_file(tensors, target / file.name, metadata=metadata)
    return target


def tiny_pair(
    folder: Path, architecture: str = "llama", *, seed: int = 0, shard_size: str = "5GB", fused: bool = False
) -> tuple[Path, Path]:
    """Folders of a random base model and of a made-up alignment of it; arguments as for `tiny_model`."""
    base = tiny_model(folder / "base", architecture, seed=seed, shard_size=shard_size, fused=fused)
    return base, perturbed_copy(base, folder / "aligned", seed=seed + 1)
