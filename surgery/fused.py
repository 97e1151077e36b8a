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


def _qkv(info: TensorInfo, config: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    try:
        query, key = _heads(config)
    except KeyError as missing:
        raise InputError(
            f"{info.name} cannot be split: config.json has no {missing}; leave out --split-fused"
        ) from None
    return -2, (query, key, key)


def _gate_up(info: TensorInfo, config: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Halves along the output axis, which is the one that is not `hidden_size` long."""
    hidden = config.get("hidden_size")
    candidates = [axis for axis in (-2, -1) if info.shape[axis] % 2 == 0 and info.shape[-3 - axis] == hidden]
    if len(candidates) != 1 or config.get("model_type") in ("gpt_oss", "gpt_oss_text"):
        raise InputError(
            f"{info.name} {list(info.shape)} cannot be split: which rows are gate and which are up is not known "
            f"for model type {config.get('model_type')}; leave out --split-fused"
        )
    half = info.shape[candidates[0]] // 2
    return candidates[0], (half, half)


def fused_slices(info: TensorInfo, config: Mapping[str, Any]) -> tuple[Slice, ...]:
    """The parts of a fused tensor; empty where it is not one.

    Raises:
        InputError: It looks fused, but its parts cannot be told apart (interleaved heads or experts).
    """
    config = text_config(config)
    sizes: tuple[int, ...]
    modules = set(info.name.split("."))
    if "c_attn" in modules and config.get("model_type") == "gpt2":
        third = info.shape[-1] // 3
        axis, sizes = -1, (third, third, third)
    elif modules & _QKV:
        axis, sizes = _qkv(info, config)
    elif modules & _GATE_UP:
        axis, sizes = _gate_up(info, config)
    elif "query_key_value" in modules:
        raise InputError(f"{info.name} interleaves its heads and cannot be split; leave out --split-fused")
    else:
        return ()
    if sum(sizes) != info.shape[axis]:
        raise InputError(
            f"{info.name} has {info.shape[axis]} outputs, its parts add up to {sum(sizes)}; leave out --split-fused"
        )
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    return tuple(Slice(axis, start, start + size) for start, size in zip(starts, sizes, strict=True))
