"""What an adapter's files say, and every way in which they can be unusable: told by name."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from surgery.checkpoint.layout import open_checkpoint
from surgery.errors import InputError, UsageError
from surgery.hub import Source, resolve_adapter
from surgery.merging import prepare
from surgery.merging.adapter import joined, read_adapter
from surgery.merging.config import read_settings
from surgery.merging.deltas import Deltas, rank_of
from surgery.merging.landing import Lora, land
from surgery.testing import write_checkpoint

PREFIX = "base_model.model."
Q0, Q1, UP = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
)
TENSORS = {
    "model.embed_tokens.weight": torch.randn(11, 6),
    f"{Q0}.weight": torch.randn(5, 6),
    f"{Q1}.weight": torch.randn(5, 6),
    f"{UP}.weight": torch.randn(9, 6),
    "model.norm.weight": torch.randn(6),
    "lm_head.weight": torch.randn(11, 6),
    "counts": torch.arange(6).view(2, 3),
}


def factors(*modules, rank=2, out=None, into=6):
    """Factors for modules of the model above."""
    found = {}
    for module in modules:
        rows = out or TENSORS[f"{module}.weight"].shape[0]
        found[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, into)
        found[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(rows, rank)
    return found


def adapter(folder, tensors, **settings):
    """A folder with these tensors and settings; returns it as a source."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": None, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return Source(folder.name, folder)


@pytest.fixture
def model(tmp_path):
    config = {"model_type": "llama", "tie_word_embeddings": False}
    return open_checkpoint(write_checkpoint(tmp_path / "model", TENSORS, config), "model")


def landed(model, source, weight=1.0):
    return land(model, [read_adapter(source)], [weight])


def test_ranks_and_scalings_follow_the_config_and_its_patterns(tmp_path):
    source = adapter(
        tmp_path / "adapter", factors(Q0), r=4, lora_alpha=8, rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={".*up_proj": 3}
    )  # fmt: skip
    settings = read_settings(source.folder, "adapter")
    assert [settings.rank(module) for module in (Q0, Q1, UP)] == [4, 2, 4]
    assert [settings.scaling(module, 4) for module in (Q0, UP)] == [2.0, 0.75]
    stable = adapter(tmp_path / "rs", factors(Q0), r=4, lora_alpha=8, use_rslora=True)
    assert read_settings(stable.folder, "rs").scaling(Q0, 4) == 8 / math.sqrt(4)


def test_factors_land_on_the_tensor_of_their_module(tmp_path, model):
    found = landed(model, adapter(tmp_path / "adapter", factors(Q0, UP)), 0.5)
    assert set(found) == {f"{Q0}.weight", f"{UP}.weight"}
    [part] = found[f"{Q0}.weight"]
    assert (part.rank, part.scaling, part.weight, part.transposed, part.expert) == (2, 2.0, 0.5, False, None)


def test_a_delta_is_the_product_of_its_factors_dense_and_low_rank_alike(tmp_path, model):
    tensors = factors(Q0, UP)
    [part] = landed(model, adapter(tmp_path / "adapter", tensors), -1.5)[f"{UP}.weight"]
    from surgery.checkpoint.reader import Reader

    with Reader(joined([read_adapter(Source("adapter", tmp_path / "adapter"))])) as reader:
        deltas = Deltas(reader, torch.device("cpu"))
        dense, low = deltas.dense(part, (9, 6)), deltas.low_rank([part, part], (9, 6))
    a, b = (tensors[f"{PREFIX}{UP}.lora_{side}.weight"] for side in "AB")
    assert torch.equal(dense, b @ a * 2.0 * -1.5)
    assert torch.allclose(low.dense(), 2 * dense, atol=1e-5)
    assert low.rank == 4
    assert torch.allclose(low.left.mT @ low.left, torch.eye(4), atol=1e-5)
    assert not torch.allclose(low.dense(), dense, atol=1e-2)  # control


def test_large_ranks_are_held_dense():
    part = Lora(0, "x", "a", "b", rank=3, scaling=1.0, weight=1.0)
    assert rank_of([part], (12, 20)) == 3
    assert rank_of([part, part], (12, 20)) is None


def test_deltas_of_parts_of_a_stack_are_those_of_the_whole(tmp_path):
    """A is (experts rank, in), B (out, rank experts); each expert takes its own."""
    from dataclasses import replace

    from surgery.checkpoint.reader import Reader

    a, b = torch.randn(3 * 2, 5), torch.randn(8, 2 * 3)
    source = adapter(
        tmp_path / "adapter",
        {f"{PREFIX}experts.lora_A.weight": a, f"{PREFIX}experts.lora_B.weight": b},
    )
    found = read_adapter(source)
    whole = Lora(0, "x", found.key(found.modules[0].a), found.key(found.modules[0].b), 2, 0.5, 1.0, experts=3)
    expected = torch.einsum("ore,eri->eoi", b.reshape(8, 2, 3), a.reshape(3, 2, 5)) * 0.5
    with Reader(joined([found])) as reader:
        deltas = Deltas(reader, torch.device("cpu"))
        assert torch.allclose(deltas.dense(whole, (3, 8, 5)), expected, atol=1e-6)
        turned = replace(whole, transposed=True)
        assert torch.allclose(deltas.dense(turned, (3, 5, 8)), expected.mT, atol=1e-6)
        lower = replace(whole, expert=1, row=4)
        assert torch.allclose(deltas.dense(lower, (4, 5)), expected[1, 4:], atol=1e-6)
        assert torch.allclose(deltas.low_rank([lower], (4, 5)).dense(), expected[1, 4:], atol=1e-5)
        assert not torch.allclose(deltas.dense(lower, (4, 5)), expected[1, :4], atol=1e-2)  # control


BROKEN = {
    "another kind": (dict(peft_type="ADALORA"), {}, "peft_type ADALORA"),
    "a base that was changed": (dict(init_lora_weights="pissa_niter_4"), {}, "init_lora_weights pissa_niter_4"),
    "layers made twice": (dict(layer_replication=[[0, 1]]), {}, "sets layer_replication"),
    "new tokens": (dict(trainable_token_indices=[1]), {}, "sets trainable_token_indices"),
    "a field from the future": (dict(use_something_new=True), {}, "sets use_something_new"),
    "no rank": (dict(r=None), {}, "adapter_config.json says 0"),
    "another rank": (dict(r=3), {}, r"q_proj.lora_A.weight of adapter has rank 2, and adapter_config.json says 3"),
    "no alpha": (dict(lora_alpha=None), {}, f"gives {Q0} the alpha None"),
    "a pattern that is none": (dict(rank_pattern={"(": 2}), {}, r"pattern \(, which is none"),
    "patterns that are no object": (dict(alpha_pattern=[1]), {}, "alpha_pattern that is no object"),
    "a missing layer": (
        dict(target_modules=["q_proj"]), {}, f"{Q1}.weight is a target of adapter, which has no factors for it"
    ),
    "half a pair": ({}, {f"{PREFIX}{UP}.lora_A.weight": torch.ones(2, 6)}, f"{UP}.lora_A.weight.*lacks the other"),
    "ranks that differ": (
        {}, {**factors(UP), f"{PREFIX}{UP}.lora_B.weight": torch.ones(9, 3)}, "their ranks differ"
    ),
    "a vector": ({}, {**factors(UP), f"{PREFIX}{UP}.lora_B.weight": torch.ones(9)}, "a matrix is needed"),
    "whole numbers": ({}, {f"{PREFIX}{UP}.weight": torch.ones(9, 6).int()}, "I32, and floats are needed"),
    "no prefix": ({}, {f"{UP}.lora_A.weight": torch.ones(2, 6)}, "does not begin with base_model.model."),
    "an unknown part": ({}, {f"{PREFIX}{UP}.lora_C.weight": torch.ones(2)}, r"lora_C.* of a kind that merge cannot"),
    "another model": ({}, factors(UP, out=8), rf"{UP}.lora_A.weight.* shape \[8, 6\].*is \[9, 6\].*another model"),
    "another width": ({}, factors(Q1, into=7), r"shape \[5, 7\].*is \[5, 6\]"),
    "a whole tensor of another shape": ({}, {f"{PREFIX}lm_head.weight": torch.ones(12, 6)}, r"lm_head.*\[12, 6\]"),
    "magnitudes of another length": (
        {}, {**factors(UP), f"{PREFIX}{UP}.lora_magnitude_vector": torch.ones(8)}, "lora_magnitude_vector of adapter"
    ),
    "a bias the model lacks": ({}, {**factors(UP), f"{PREFIX}{UP}.lora_B.bias": torch.ones(9)}, "lands nowhere"),
    "a tensor of whole numbers": ({}, {f"{PREFIX}counts": torch.ones(2, 3)}, "counts, which is I64"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_an_adapter_that_cannot_be_merged_is_refused_by_name(tmp_path, model, fault):
    settings, tensors, message = BROKEN[fault]
    source = adapter(tmp_path / "adapter", {**factors(Q0), **tensors}, **settings)
    with pytest.raises(InputError, match=message):
        landed(model, source)
    assert landed(model, adapter(tmp_path / "adapter", factors(Q0)))  # control


def test_layers_that_the_config_leaves_out_may_be_missing(tmp_path, model):
    named = dict(target_modules=["q_proj"])
    for own in (
        dict(layers_to_transform=[0]),
        dict(exclude_modules=["1"]),
        dict(target_modules=r".*0.*q_proj"),
    ):
        assert landed(model, adapter(tmp_path / "adapter", factors(Q0), **{**named, **own}))
    assert landed(model, adapter(tmp_path / "adapter", factors(Q0, Q1), **named))


def test_a_tied_embedding_is_changed_only_by_who_meant_both(tmp_path):
    tied = {name: value for name, value in TENSORS.items() if name != "lm_head.weight"}
    checkpoint = open_checkpoint(
        write_checkpoint(tmp_path / "tied", tied, {"tie_word_embeddings": True}), "tied"
    )
    lookup = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(2, 11),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.ones(6, 2),
    }
    with pytest.raises(InputError, match=r"embed_tokens\.weight is both the embedding and the head"):
        landed(checkpoint, adapter(tmp_path / "adapter", lookup))
    [part] = landed(checkpoint, adapter(tmp_path / "adapter", lookup, ensure_weight_tying=True))[
        "model.embed_tokens.weight"
    ]
    assert part.transposed


def test_pickles_and_folders_without_an_adapter_are_refused(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    with pytest.raises(InputError, match="holds no adapter"):
        read_adapter(Source("adapter", folder))
    torch.save({"a": torch.ones(1)}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match="a pickle, which can hide code"):
        read_adapter(Source("adapter", folder))
    save_file({"x": torch.ones(1, dtype=torch.bfloat16)}, folder / "delta.safetensors")
    with pytest.raises(InputError, match="x in adapter is BF16, and deltas in F32"):
        read_adapter(Source("adapter", folder))
    for number in (1, 2):
        save_file({"x": torch.ones(1)}, folder / f"delta-{number}.safetensors")
    (folder / "delta.safetensors").unlink()
    with pytest.raises(InputError, match="x is in two files"):
        read_adapter(Source("adapter", folder))


def test_sources_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no folder nowhere"):
        resolve_adapter("nowhere")
    with pytest.raises(UsageError, match="name is empty"):
        resolve_adapter("")
    with pytest.raises(UsageError, match="names no model on the Hub"):
        resolve_adapter("hf://one")
    with pytest.raises(UsageError, match="there is no adapter"):
        prepare(tmp_path, [])
