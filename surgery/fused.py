"""Matrices that are stored fused (qkv, gate_up) and the parts they are made of.

By default a fused matrix is edited as it is stored, which is what the authors' script would see. With
`--split-fused` each part is a matrix of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from surgery.checkpoint.header import TensorInfo
from surgery.errors import InputError
from surgery.selection import text_config

_QKV = frozenset(("qkv_proj", "Wqkv", "qkv", "W_pack"))
_GATE_UP = frozenset(("gate_up_proj", "gate_up"))
_WAY_OUT = "leave out --split-fused, or --exclude it"
# Modules whose rows take turns between the parts, one attention head (or group of heads) after the other.
_INTERLEAVED = frozenset(("query_key_value", "wqkv", "in_proj_qkvz", "in_proj_ba"))
# Model types in which `input_linear` is gate and up; in JetMoE's attention it is the query alone.
_STACKED = frozenset(("granitemoe", "granitemoehybrid", "granitemoeshared", "jetmoe"))
_ATTENTION = frozenset(("self_attn", "self_attention", "attention", "attn"))


Parts = tuple[int, tuple[int, ...]]
"""Axis and sizes."""


@dataclass(frozen=True)
class Slice:
    """A range of a tensor along one axis: entries from `start` up to, not including, `stop`."""

    axis: int
    start: int
    stop: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this part of a tensor of shape `whole`."""
        axis = self.axis % len(whole)
        return (*whole[:axis], self.stop - self.start, *whole[axis + 1 :])

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor, as a view."""
        return tensor.narrow(self.axis, self.start, self.stop - self.start)


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows of the query part, and of the key (and value) part."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return heads * width, (config.get("num_key_value_heads") or heads) * width


def _qkv(info: TensorInfo, config: Mapping[str, Any]) -> Parts:
    try:
        query, key = _heads(config)
    except KeyError as missing:
        raise InputError(f"{info.name} cannot be split: config.json has no {missing}; {_WAY_OUT}") from None
    return -2, (query, key, key)


def _c_attn(info: TensorInfo, config: Mapping[str, Any]) -> Parts:
    """Query, key and value of the model types that call all three `c_attn`."""
    kind, width = config.get("model_type"), config.get("n_embd") or config.get("hidden_size") or 0
    if kind == "gpt2":
        # Attention to an encoder takes its query from a tensor of its own.
        parts = 2 if "crossattention" in info.name else 3
        return -1, (width or info.shape[-1] // parts,) * parts
    if kind == "qwen":
        third = config.get("kv_channels", 0) * config.get("num_attention_heads", 0) or width
        return -2, (third, third, third)
    if kind == "gpt_bigcode" and config.get("multi_query", True) and config.get("n_head"):
        return -2, (width, width // config["n_head"], width // config["n_head"])
    raise InputError(
        f"{info.name} cannot be split: its parts are not known for model type {kind}; {_WAY_OUT}"
    )


def _gate_up(info: TensorInfo, config: Mapping[str, Any]) -> Parts:
    """Halves along the output axis, which is the one that is not `hidden_size` long."""
    hidden = config.get("hidden_size")
    candidates = [axis for axis in (-2, -1) if info.shape[axis] % 2 == 0 and info.shape[-3 - axis] == hidden]
    if len(candidates) != 1 or config.get("model_type") in ("gpt_oss", "gpt_oss_text"):
        raise InputError(
            f"{info.name} {list(info.shape)} cannot be split: which rows are gate and which are up is not known "
            f"for model type {config.get('model_type')}; {_WAY_OUT}"
        )
    half = info.shape[candidates[0]] // 2
    return candidates[0], (half, half)


def _input_linear(info: TensorInfo, modules: set[str], config: Mapping[str, Any]) -> Parts | None:
    """Gate and up of Granite's and JetMoE's experts, one half after the other; None for the query of an attention."""
    if modules & _ATTENTION:
        return None
    if config.get("model_type") not in _STACKED or info.shape[-2] % 2:
        raise InputError(
            f"{info.name} cannot be split: whether it is gate and up is not known for model type "
            f"{config.get('model_type')}; {_WAY_OUT}"
        )
    return -2, (info.shape[-2] // 2, info.shape[-2] // 2)


def _parts(info: TensorInfo, config: Mapping[str, Any]) -> Parts | None:
    """The axis that the parts of a fused tensor are stacked on, and their sizes; None where it is not fused."""
    modules = set(info.name.split("."))
    if "c_attn" in modules:
        return _c_attn(info, config)
    if modules & _QKV:
        return _qkv(info, config)
    if modules & _GATE_UP:
        return _gate_up(info, config)
    if "input_linear" in modules:
        return _input_linear(info, modules, config)
    if modules & _INTERLEAVED:
        raise InputError(f"{info.name} interleaves its heads and cannot be split; {_WAY_OUT}")
    if any("qkv" in part.lower() for part in modules):
        raise InputError(f"{info.name} looks fused, and how is not known; {_WAY_OUT}")
    return None


def fused_slices(info: TensorInfo, config: Mapping[str, Any]) -> tuple[Slice, ...]:
    """The parts of a fused tensor; empty where it is not one.

    Raises:
        InputError: It looks fused, but its parts cannot be told apart (interleaved heads or experts).
    """
    found = _parts(info, text_config(config))
    if found is None:
        return ()
    axis, sizes = found
    if sum(sizes) != info.shape[axis]:
        raise InputError(
            f"{info.name} has {info.shape[axis]} outputs, its parts add up to {sum(sizes)}; {_WAY_OUT}"
        )
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    return tuple(Slice(axis, start, start + size) for start, size in zip(starts, sizes, strict=True))
