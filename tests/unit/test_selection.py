"""Kinds and layers, read from names."""

import pytest

from surgery.checkpoint.header import TensorInfo
from surgery.errors import InputError, UsageError
from surgery.methods.lox import LoX
from surgery.selection import kind_of, layer_of


def info(name, shape=(8, 8), dtype="BF16"):
    return TensorInfo(name, dtype, shape, "f", 0, 0)


KINDS = {
    "model.layers.0.mlp.gate.wg.weight": "router",
    "model.layers.0.mlp.gate.weight": "router",
    "model.layers.0.mlp.router.classifier.weight": "router",
    "model.layers.0.mlp.gate_proj.weight": "matrix",
    "model.layers.0.attn.wg.weight": "matrix",
    "transformer.output_layer.weight": "head",
    "lm_head.weight": "head",
    "model.layers.61.shared_head.head.weight": "head",
    "model.layers.3.attention.output.weight": "matrix",
    "model.layers.3.head.weight": "matrix",
    "model.language_model.embed_tokens_per_layer.weight": "embedding",
    "model.layers.61.embed_tokens.weight": "embedding",
    "visual.pos_embed.weight": "embedding",
    "visual.pos_embed": "embedding",
    "vision_model.embeddings.position_embedding.weight": "embedding",
    "model.layers.0.self_attn.o_proj.weight": "matrix",
    "model.layers.61.eh_proj.weight": "matrix",
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_read_from_names(name):
    assert kind_of(info(name), {}) == KINDS[name]


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind != "matrix"])
def test_linear_leaves_out_what_is_no_linear_layer(name):
    choice = LoX(edit="linear").choose(info(name), {})
    assert (choice.edit, choice.reason) == (False, f"{KINDS[name]}, left out by --edit linear")
    assert LoX().choose(info(name), {}).edit  # control


LAYERS = {
    "model.layers.7.mlp.up_proj.weight": 7,
    "model.language_model.layers.7.mlp.up_proj.weight": 7,
    "transformer.h.7.attn.c_attn.weight": 7,
    "transformer.encoder.layers.7.mlp.weight": 7,
    "encoder.block.7.layer.0.SelfAttention.q.weight": 7,
    "transformer.blocks.7.ffn.up_proj.weight": 7,
    "model.embed_tokens.weight": None,
    "visual.blocks.7.attn.qkv.weight": None,
    "model.visual.blocks.7.attn.qkv.weight": None,
    "vision_tower.vision_model.encoder.layers.7.mlp.fc1.weight": None,
    "model.vision_tower.encoder.layer.7.mlp.fc1.weight": None,
    "vision_model.encoder.layers.7.mlp.fc1.weight": None,
    "audio_tower.layers.7.fc1.weight": None,
    "speech_encoder.layers.7.fc1.weight": None,
    "mtp.layers.0.mlp.up_proj.weight": None,
    "thinker.model.layers.7.mlp.up_proj.weight": 7,
    "thinker.visual.blocks.7.mlp.up_proj.weight": None,
    "talker.model.layers.7.mlp.up_proj.weight": None,
    "revision.layers.7.weight": 7,
    "supervised.layers.7.weight": 7,
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_the_language_model(name):
    assert layer_of(name) == LAYERS[name]
    choice = LoX(layers="7:8").choose(info(name), {})
    assert choice.edit is (LAYERS[name] == 7)


def test_an_option_that_is_no_range_of_layers_is_refused():
    with pytest.raises(UsageError, match="layers"):
        LoX(layers="8:7")


def chosen(depth, count, **config):
    """The layers of a model that `depth` edits."""
    config = config or {"num_hidden_layers": count}
    names = (f"model.layers.{number}.mlp.up_proj.weight" for number in range(count))
    return [number for number, name in enumerate(names) if LoX(depth=depth).choose(info(name), config).edit]


@pytest.mark.parametrize(
    ("depth", "count", "wanted"),
    [
        ("0:0.5", 4, [0, 1]),
        ("0.5:", 4, [2, 3]),
        (":0.34", 3, [0]),
        ("0:1", 3, [0, 1, 2]),
        ("0.25:.75", 4, [1, 2]),
        ("0:0.5", 5, [0, 1]),
        ("0.5:1", 5, [2, 3, 4]),
    ],
)
def test_depth_takes_the_layers_whose_middle_lies_in_it(depth, count, wanted):
    assert chosen(depth, count) == wanted


@pytest.mark.parametrize(
    "config", [{"n_layer": 4}, {"text_config": {"num_hidden_layers": 4}}, {"num_layers": 4}]
)
def test_the_number_of_layers_is_read_from_any_config(config):
    assert chosen("0:0.5", 4, **config) == [0, 1]


@pytest.mark.parametrize(("depth", "count"), [("0.9:0.91", 4), ("0:0.01", 30), ("0.6:1", 1)])
def test_a_depth_without_a_layer_in_it_is_refused(depth, count):
    with pytest.raises(UsageError, match=f"depth {depth} has the middle of none of the {count} layers"):
        chosen(depth, count)


def test_depth_leaves_what_is_in_no_layer_to_the_other_options():
    config = {"num_hidden_layers": 4}
    assert LoX(depth="0:0.5").choose(info("model.embed_tokens.weight"), config).edit
    assert LoX(depth="0:0.5").choose(info("lm_head.weight"), config).edit
    assert not LoX(depth="0:0.5", edit="linear").choose(info("lm_head.weight"), config).edit
    assert not LoX(depth="0:0.5", layers="1:4").choose(info("model.layers.0.mlp.up_proj.weight"), config).edit
    choice = LoX(depth="0:0.5").choose(info("model.layers.3.mlp.up_proj.weight"), config)
    assert (choice.edit, choice.reason) == (False, "not in --depth")


@pytest.mark.parametrize("depth", ["0.5:0.5", "0.6:0.4", "0:1.5", "half", "", ".:1", "0:0.5:1", "-1:1"])
def test_a_depth_that_is_no_share_is_refused(depth):
    with pytest.raises(UsageError, match="depth"):
        LoX(depth=depth)


def test_depth_needs_the_number_of_layers():
    with pytest.raises(InputError, match="--layers"):
        LoX(depth="0:0.5").choose(info("model.layers.0.mlp.up_proj.weight"), {})
    assert LoX(depth="0:0.5").choose(info("model.embed_tokens.weight"), {}).edit
