"""Parts of `--as-lora` that need no files: blocks of factors, rank patterns, names, tied embeddings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from transformers import AutoModelForCausalLM, MixtralConfig, OPTConfig

from surgery.adapter import adapter_method, adapter_size, ties_embeddings
from surgery.adapter_names import Names
from surgery.adapter_peft import Piece, block_factors, raised_ranks, rank_pattern, wrapped_as_module
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.layout import Checkpoint
from surgery.errors import InputError, UsageError
from surgery.fused import Slice
from surgery.methods.lox import LoX
from surgery.plan import Step
from surgery.spectral import Factors

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def factors(m, n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    return Factors(left, torch.rand(k, generator=generator) + 0.5, right)


def model_of(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def infos(shapes):
    return {name: TensorInfo(name, "F32", shape, "model.safetensors", 0, 0) for name, shape in shapes.items()}


def checkpoint(shapes, config, tmp_path):
    return Checkpoint(tmp_path, "aligned", (), infos(shapes), config, None, ())


# blocks


def test_blocks_of_a_matrix_add_up_each_at_its_place():
    pieces = [Piece(factors(3, 7, 2), row=0), Piece(factors(5, 4, 3, seed=1), row=3, column=2)]
    left, right = block_factors((9, 7), pieces)
    wanted = torch.zeros(9, 7)
    wanted[:3] += pieces[0].factors.dense()
    wanted[3:8, 2:6] += pieces[1].factors.dense()
    assert left.shape == (9, 5)
    assert left.dtype == right.dtype == torch.float32
    assert torch.allclose(left @ right, wanted, atol=1e-6)
    assert not torch.allclose(left @ right, wanted.roll(1, 0), atol=1e-2)  # control


def test_experts_of_unequal_rank_are_padded_to_the_largest():
    pieces = [
        Piece(factors(4, 3, 1), expert=0),
        Piece(factors(2, 3, 2, seed=1), expert=2),
        Piece(factors(2, 3, 1, seed=2), row=2, expert=2),
    ]
    left, right = block_factors((3, 4, 3), pieces)
    assert left.shape == (3, 4, 3)
    product = left @ right
    assert torch.allclose(product[0], pieces[0].factors.dense(), atol=1e-6)
    assert torch.count_nonzero(product[1]) == 0
    assert torch.allclose(product[2], torch.cat([piece.factors.dense() for piece in pieces[1:]]), atol=1e-6)
    assert torch.count_nonzero(product[2]) == product[2].numel()  # control


def test_directions_of_value_zero_take_no_rank_and_an_empty_edit_has_rank_one():
    whole = factors(4, 3, 3)
    short = Factors(whole.left, torch.tensor([2.0, 0.0, 0.0]), whole.right)
    left, right = block_factors((4, 3), [Piece(short)])
    assert left.shape == (4, 1)
    assert torch.allclose(left @ right, short.dense(), atol=1e-6)
    left, right = block_factors((4, 3), [Piece(short.scaled(0.0))])
    assert left.shape == (4, 1)
    assert torch.count_nonzero(left @ right) == 0


# patterns

NAMES = [
    f"model.layers.{i}.{m}"
    for i in (1, 2, 11)
    for m in ("attn.q_proj", "mlp.gate", "mlp.gate.weight", "xq_proj")
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=len(NAMES), max_size=len(NAMES)))
def test_peft_reads_the_rank_of_every_name_from_the_pattern(drawn):
    ranks = dict(zip(NAMES, drawn, strict=True))
    pattern = rank_pattern(ranks)
    assert len(pattern) < len(set(drawn)) or len(set(drawn)) == 1
    for name, rank in ranks.items():
        assert pattern.get(get_pattern_key(pattern, name), max(drawn)) == rank


def test_a_pattern_uses_last_names_where_they_have_one_rank():
    ranks = {"a.0.q": 6, "a.1.q": 6, "a.0.k": 2, "a.1.k": 2, "a.0.v": 2, "a.1.v": 6}
    assert rank_pattern(ranks) == {r"a\.0\.v|k": 2}
    assert rank_pattern(dict.fromkeys(ranks, 6)) == {}


def test_ranks_of_parameters_are_raised_to_one_that_a_module_has():
    ranks = {"experts.up": 12, "experts.down": 5, "gate.weight": 7, "q.weight": 6}
    raised = raised_ranks(ranks, {"experts.up", "experts.down", "gate.weight"})
    assert raised == {"experts.up": 12, "experts.down": 6, "gate.weight": 12, "q.weight": 6}


# names


def test_experts_stored_one_by_one_lie_in_the_stacked_parameter():
    model = model_of(MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=3, num_key_value_heads=1))
    start = "model.layers.1.block_sparse_moe."
    shapes = {f"{start}experts.{i}.{w}.weight": (24, 16) for i in range(3) for w in ("w1", "w3")}
    shapes |= {f"{start}experts.{i}.w2.weight": (16, 24) for i in range(3)} | {f"{start}gate.weight": (3, 16)}
    names = Names(infos(shapes), model)
    places = {name.removeprefix(start): names.place(name) for name in shapes}
    gate_up = places["experts.2.w3.weight"]
    assert (gate_up.parameter, gate_up.expert, gate_up.row) == (
        "model.layers.1.mlp.experts.gate_up_proj",
        2,
        24,
    )
    assert (places["experts.2.w1.weight"].row, places["experts.0.w2.weight"].row) == (0, 0)
    assert places["experts.0.w2.weight"].parameter == "model.layers.1.mlp.experts.down_proj"
    assert places["gate.weight"].parameter == "model.layers.1.mlp.gate.weight"
    assert places["gate.weight"].whole
    assert not gate_up.whole


def test_a_shape_that_the_model_does_not_have_is_refused_by_name():
    model = model_of(MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=3, num_key_value_heads=1))
    odd = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    names = Names(infos({odd: (16, 25), "lm_head.weight": (41, 16), "mtp.weight": (2, 2)}), model)
    assert names.place("mtp.weight") is None
    with pytest.raises(InputError, match=r"experts\.1\.w2\.weight \[16, 25\].*--exclude 'experts'"):
        names.place(odd)
    with pytest.raises(InputError, match=r"lm_head\.weight is \[41, 16\]"):
        names.place("lm_head.weight")


def test_layers_with_a_forward_of_their_own_are_adapted_by_parameter():
    model = model_of(OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=9))
    assert wrapped_as_module(model, "model.decoder.layers.0.fc1.weight")
    assert wrapped_as_module(model, "model.decoder.embed_tokens.weight")
    # It adds 2 to positions before it looks them up, so PEFT's own layer for embeddings would read other rows.
    assert not wrapped_as_module(model, "model.decoder.embed_positions.weight")
    assert not wrapped_as_module(model, "model.decoder.layers.0.fc1.bias")


# tied embeddings and sizes

HEADLESS = {"model.embed_tokens.weight": (40, 16), "model.layers.0.mlp.up_proj.weight": (24, 16)}
WITH_HEAD = {**HEADLESS, "lm_head.weight": (40, 16)}


@pytest.mark.parametrize(
    ("shapes", "config", "tied"),
    [
        (HEADLESS, {}, True),
        (HEADLESS, {"tie_word_embeddings": True}, True),
        (HEADLESS, {"text_config": {"tie_word_embeddings": True}}, True),
        (WITH_HEAD, {"tie_word_embeddings": True}, True),
        (HEADLESS, {"tie_word_embeddings": False}, False),
        (WITH_HEAD, {}, False),
        (WITH_HEAD, {"tie_word_embeddings": False}, False),
    ],
)
def test_tied_is_read_from_files_and_config(shapes, config, tied, tmp_path):
    assert ties_embeddings(checkpoint(shapes, config, tmp_path)) is tied


def test_a_tied_checkpoint_makes_the_edit_linear_and_says_so(tmp_path):
    tied, untied = checkpoint(HEADLESS, {}, tmp_path), checkpoint(WITH_HEAD, {}, tmp_path)
    asked = LoX(rank=3, alpha=2.0, include="embed|up_proj", split_fused=True)
    method, note = adapter_method(asked, tied)
    assert method == LoX(rank=3, alpha=2.0, include="embed|up_proj", split_fused=True, edit="linear")
    assert "embeddings, head and routers are not edited" in note
    embedding = tied.tensors["model.embed_tokens.weight"]
    assert not method.choose(embedding, {}).edit
    assert adapter_method(asked, untied) == (asked, "")
    assert asked.choose(embedding, {}).edit  # control
    assert adapter_method(LoX(edit="linear"), tied) == (LoX(edit="linear"), "")


def test_full_rank_is_refused(tmp_path):
    with pytest.raises(UsageError, match="an adapter needs a rank"):
        adapter_method(LoX(rank="full"), checkpoint(WITH_HEAD, {}, tmp_path))


def test_the_size_of_an_adapter_counts_factors_and_what_a_base_anchor_lacks():
    halves = (Slice(1, 0, 2), Slice(1, 2, 4))
    steps = {
        "a": Step("a", "edit", "", (5, 7), "BF16", 3),
        "b": Step("b", "edit", "", (2, 4, 6), "BF16", 2, slices=halves),
        "c": Step("c", "copy", "", (11,), "BF16"),
    }
    factors = 4 * (3 * 12 + 2 * 2 * 2 * 10)
    assert adapter_size(LoX(), steps) == factors
    assert adapter_size(LoX(anchor="base"), steps) == factors + 22
