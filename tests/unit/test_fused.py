"""Parts of fused matrices, against what the modelling code of each family does with its output."""

from itertools import pairwise

import pytest
import torch

from surgery.checkpoint.header import TensorInfo
from surgery.errors import InputError
from surgery.fused import Slice, fused_slices

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
GRANITE = {"model_type": "granitemoe", "num_local_experts": 3}


def parts(name, shape, config):
    return fused_slices(TensorInfo(name, "BF16", shape, "f", 0, 0), config)


# name, shape, config, axis and sizes of the parts
KNOWN = [
    ("h.0.attn.c_attn.weight", (16, 48), {"model_type": "gpt2", "n_embd": 16}, -1, (16, 16, 16)),
    ("h.0.crossattention.c_attn.weight", (18, 36), {"model_type": "gpt2", "n_embd": 18}, -1, (18, 18)),
    (
        "transformer.h.0.attn.c_attn.weight",
        (48, 20),
        {"model_type": "qwen", "hidden_size": 20, "kv_channels": 4, "num_attention_heads": 4},
        -2,
        (16, 16, 16),
    ),
    (
        "transformer.h.0.attn.c_attn.weight",
        (60, 20),
        {"model_type": "qwen", "hidden_size": 20},
        -2,
        (20, 20, 20),
    ),
    (
        "transformer.h.0.attn.c_attn.weight",
        (24, 16),
        {"model_type": "gpt_bigcode", "n_embd": 16, "n_head": 4},
        -2,
        (16, 4, 4),
    ),
    ("layers.0.self_attn.qkv_proj.weight", (32, 16), HEADS, -2, (16, 8, 8)),
    ("layers.0.attn.Wqkv.weight", (48, 16), {"num_attention_heads": 4, "hidden_size": 16}, -2, (16, 16, 16)),
    ("layers.0.mlp.gate_up_proj.weight", (40, 16), {"hidden_size": 16}, -2, (20, 20)),
    ("layers.0.mlp.experts.gate_up_proj", (3, 16, 40), {"hidden_size": 16}, -1, (20, 20)),
    ("model.layers.0.block_sparse_moe.input_linear.weight", (3, 40, 16), GRANITE, -2, (20, 20)),
    (
        "model.layers.0.shared_mlp.input_linear.weight",
        (24, 16),
        {"model_type": "granitemoeshared"},
        -2,
        (12, 12),
    ),
    ("model.layers.0.mlp.input_linear.weight", (3, 24, 16), {"model_type": "jetmoe"}, -2, (12, 12)),
]


@pytest.mark.parametrize(("name", "shape", "config", "axis", "sizes"), KNOWN)
def test_parts_cover_the_fused_axis_in_order(name, shape, config, axis, sizes):
    found = parts(name, shape, config)
    edges = torch.tensor((0, *sizes)).cumsum(0).tolist()
    assert found == tuple(Slice(axis, start, stop) for start, stop in pairwise(edges))
    assert edges[-1] == shape[axis]


@pytest.mark.parametrize(
    ("name", "shape", "config"),
    [
        ("model.layers.0.attention.wqkv.weight", (32, 16), {"model_type": "internlm2", **HEADS}),
        ("model.layers.0.linear_attn.in_proj_qkvz.weight", (64, 16), {"model_type": "qwen3_next", **HEADS}),
        ("model.layers.0.linear_attn.in_proj_ba.weight", (8, 16), {"model_type": "qwen3_next", **HEADS}),
        ("model.layers.0.linear_attn.in_proj_qkv.weight", (64, 16), {"model_type": "qwen3_5", **HEADS}),
        ("gpt_neox.layers.0.attention.query_key_value.weight", (48, 16), {"model_type": "gpt_neox"}),
        ("h.0.attn.c_attn.weight", (48, 16), {"model_type": "unheard_of"}),
        (
            "h.0.attn.c_attn.weight",
            (48, 16),
            {"model_type": "gpt_bigcode", "n_head": 4, "multi_query": False},
        ),
        ("h.0.attn.c_attn.weight", (16, 50), {"model_type": "gpt2", "n_embd": 16}),
        ("model.layers.0.mlp.input_linear.weight", (24, 16), {"model_type": "unheard_of"}),
        ("layers.0.mlp.experts.gate_up_proj", (3, 16, 40), {"hidden_size": 16, "model_type": "gpt_oss"}),
        ("layers.0.self_attn.qkv_proj.weight", (33, 16), HEADS),
        ("layers.0.self_attn.qkv_proj.weight", (32, 16), {}),
        ("visual.blocks.0.attn.qkv.weight", (96, 32), HEADS),
    ],
)
def test_what_cannot_be_told_apart_is_refused_by_name_with_both_ways_out(name, shape, config):
    with pytest.raises(InputError) as caught:
        parts(name, shape, config)
    message = str(caught.value)
    assert message.startswith(name)
    assert "--split-fused" in message
    assert "--exclude" in message


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("layers.0.self_attn.q_proj.weight", HEADS),
        ("layers.0.mlp.down_proj.weight", HEADS),
        ("model.layers.0.self_attention.experts.input_linear.weight", {"model_type": "jetmoe"}),
    ],
)
def test_what_is_not_fused_has_no_parts(name, config):
    assert parts(name, (16, 16), config) == ()


def test_interleaved_rows_are_no_range():
    """Why InternLM2 is refused: its rows go by groups of heads, so a range of rows mixes query, key and value."""
    heads, groups, width = 4, 2, 3
    rows = torch.tensor([[*range(heads // groups), 8, 9]] * groups)  # 8 is the key of a group, 9 its value
    order = rows.flatten().repeat_interleave(width)
    assert len(order[: heads * width].unique()) > heads // groups
