"""What kind of tensor a name, a shape and a model's config denote.

No model class is needed: kinds are read from the names that model files use. `matrices` are all 2-D floating
tensors and the 3-D ones that hold experts; `linear` leaves out embeddings, output heads and routers.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from surgery.checkpoint.header import TensorInfo

Kind = Literal["matrix", "experts", "embedding", "head", "router", "vector", "not a float", "other shape"]

_EMBEDDINGS = frozenset(
    [
        "embed_tokens",
        "embed_tokens_per_layer",
        "wte",
        "wpe",
        "word_embeddings",
        "word_embedding",
        "embed_in",
        "tok_embeddings",
        "tokens_embed",
        "embed_positions",
        "position_embeddings",
        "position_embedding",
        "pos_embed",
        "token_type_embeddings",
        "shared",
        "embeddings",
        "embed",
        "embedding",
    ]
)
_HEADS = frozenset(["lm_head", "embed_out", "output", "output_layer", "head", "score"])
_ROUTERS = frozenset(["gate", "router", "shared_expert_gate"])
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Names under which Granite and JetMoE stack their experts; taken for experts only with a count in the config.
_STACKED = frozenset(["input_linear", "output_linear"])
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
# Parts of a multimodal model that are no language model, and modules that predict further tokens.
_BESIDE = re.compile(
    r"(^|[._])(visual|vision|vit|image|video|audio|speech|siglip|clip|tower|mtp|talker|(token|code)2wav)(?=[._])"
)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: itself, or `text_config` of a multimodal one."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def layer_of(name: str) -> int | None:
    """The index of the language model's layer that a tensor belongs to, None outside its layers."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found and not _BESIDE.search(name[: found.start() + 1]) else None


def layer_count(config: Mapping[str, Any]) -> int | None:
    """How many layers the language model has, None where its config does not say."""
    told = text_config(config)
    return next((told[key] for key in _LAYER_COUNTS if isinstance(told.get(key), int)), None)


def module_of(name: str) -> str:
    """What a tensor is called in every layer alike: `self_attn.q_proj`, `mlp.experts.*.up_proj`, `embed_tokens`."""
    found = _LAYER.search(name)
    inside = found is not None and layer_of(name) is not None
    parts = _modules(name[found.end() :] if found and inside else name)
    parts = ["*" if part.isdigit() else part for part in parts]
    return ".".join(parts if inside else [part for part in parts if part != "model"])


def _modules(name: str) -> list[str]:
    """The module path of a tensor: its dotted name without the parameter's own name.

    A parameter that is no module's `weight` or `bias` counts as a module (`pos_embed`).
    """
    parts = name.split(".")
    return parts[:-1] if len(parts) > 1 and parts[-1] not in _EMBEDDINGS else parts


def holds_experts(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Whether a 3-D tensor is a stack of expert matrices: by its name, and by the config where that counts them."""
    if len(shape) != 3:
        return False
    counts = [config[key] for key in _EXPERT_COUNTS if isinstance(config.get(key), int)]
    parts = name.split(".")
    if any("expert" in part for part in parts):
        return not counts or shape[0] in counts
    return shape[0] in counts and not _STACKED.isdisjoint(parts)


def kind_of(tensor: TensorInfo, config: Mapping[str, Any]) -> Kind:
    """The kind of a tensor."""
    if not tensor.is_float:
        return "not a float"
    if len(tensor.shape) < 2 or tensor.numel == 0:
        return "vector"
    if len(tensor.shape) == 3 and holds_experts(tensor.name, tensor.shape, text_config(config)):
        return "experts"
    if len(tensor.shape) != 2:
        return "other shape"
    return _kind_of_matrix(_modules(tensor.name))


def _kind_of_matrix(modules: list[str]) -> Kind:
    if modules[-1] in _EMBEDDINGS:
        return "embedding"
    # A head is the model's last module, not the `output` projection inside a block.
    if modules[-1] in _HEADS and not any(part.isdigit() for part in modules):
        return "head"
    # Modules that predict further tokens (DeepSeek's MTP) are counted as layers and have a head of their own.
    if modules[-2:] == ["shared_head", "head"]:
        return "head"
    if modules[-1] in _ROUTERS or "router" in modules or modules[-2:] == ["gate", "wg"]:
        return "router"
    return "matrix"
