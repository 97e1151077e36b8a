"""Tensors of every dtype, shape and kind through a whole run, against float64."""

import json

import pytest
import torch

import surgery
from surgery.errors import InputError
from surgery.testing import read_tensors, write_checkpoint

RANK, ALPHA = 3, 1.25
METHOD = surgery.LoX(rank=RANK, alpha=ALPHA)
WIDE = {torch.float32, torch.float64}
CODES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SHAPES = {
    "model.embed_tokens.weight": (97, 40),
    "model.layers.0.self_attn.q_proj.weight": (40, 40),
    "model.layers.0.mlp.up_proj.weight": (75, 40),
    "model.layers.0.mlp.gate.weight": (4, 40),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 50, 40),
    "model.layers.0.mlp.experts.down_proj": (4, 40, 25),
}
CONFIG = {"num_experts": 4, "hidden_size": 40, "num_attention_heads": 4}


def pair(folder, aligned, base, *, size=3e-2, scale=1.0):
    """Folders of two checkpoints in these dtypes, the second a change of low rank over noise away from the first."""
    generator = torch.Generator().manual_seed(0)
    before, after = (
        {"model.norm.weight": torch.ones(40).to(base)},
        {"model.norm.weight": torch.ones(40).to(aligned)},
    )
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        left = torch.randn(*shape[:-1], 3, generator=generator, dtype=torch.float64)
        right = torch.randn(*shape[:-2], 3, shape[-1], generator=generator, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        before[name] = weight.to(base)
        after[name] = (weight + size * scale * (left @ right + 0.3 * noise)).to(aligned)
    return write_checkpoint(folder / "base", before, CONFIG), write_checkpoint(
        folder / "aligned", after, CONFIG
    )


def truncated(delta, rank=RANK):
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


def figures(output):
    lines = (output / "surgery.tensors.jsonl").read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def assert_edited(base, aligned, output, dtype, *, anchor="aligned"):
    """Every matrix of the output is the equation's, up to its certificate and the rounding of its own dtype."""
    before, after, found = read_tensors(base), read_tensors(aligned), read_tensors(output)
    for name in SHAPES:
        assert found[name].dtype == dtype
        start = (after if anchor == "aligned" else before)[name].double()
        meant = ALPHA * truncated(after[name].double() - before[name].double())
        kept, record = found[name].double() - start, figures(output)[name]
        wide = dtype in WIDE
        rounding = EPSILON[dtype] * torch.linalg.norm(found[name].double()) * (1 if wide else 3)
        bound = (
            record["certified_error"] * torch.linalg.norm(meant) + rounding + 1e-6 * torch.linalg.norm(meant)
        )
        assert torch.linalg.norm(kept - meant) <= bound, name
        retention = float((kept * meant).sum() / meant.square().sum())
        assert retention == pytest.approx(1, abs=2e-3 if wide else 2e-2), name
        assert record["retention"] == pytest.approx(retention, abs=2e-3), name
        assert torch.linalg.norm(kept + meant) > bound  # control: the other way round is refused


@pytest.mark.parametrize("ours", CODES)
@pytest.mark.parametrize("theirs", CODES)
def test_any_two_dtypes_make_a_pair(tmp_path, ours, theirs):
    base, aligned = pair(tmp_path, CODES[ours], CODES[theirs])
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "out")
    assert_edited(base, aligned, tmp_path / "out", CODES[ours])


@pytest.mark.parametrize(("ours", "theirs"), [("bf16", "fp32"), ("fp16", "bf16"), ("fp64", "bf16")])
def test_the_base_anchor_of_another_dtype_comes_out_in_the_aligned_one(tmp_path, ours, theirs):
    base, aligned = pair(tmp_path, CODES[ours], CODES[theirs])
    method = surgery.LoX(rank=RANK, alpha=ALPHA, anchor="base")
    surgery.apply(method, base=base, model=aligned, output=tmp_path / "out")
    assert_edited(base, aligned, tmp_path / "out", CODES[ours], anchor="base")


@pytest.mark.parametrize(("ours", "asked"), [("fp64", "float16"), ("bf16", "float32"), ("fp32", "bfloat16")])
def test_another_dtype_may_be_asked_for(tmp_path, ours, asked):
    base, aligned = pair(tmp_path, CODES[ours], CODES[ours])
    options = surgery.Options(dtype=asked)
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "out", options=options)
    assert read_tensors(tmp_path / "out")["model.norm.weight"].dtype == getattr(torch, asked)
    assert_edited(base, aligned, tmp_path / "out", getattr(torch, asked))


@pytest.mark.parametrize(("ours", "asked"), [("fp16", "keep"), ("bf16", "float16")])
def test_overflow_of_fp16_is_refused_by_name_and_nothing_is_left(tmp_path, ours, asked):
    base, aligned = pair(tmp_path, CODES[ours], CODES[ours], size=2e-1, scale=10000.0)
    options = surgery.Options(dtype=asked)
    method = surgery.LoX(rank=RANK, alpha=60.0)
    with pytest.raises(
        InputError, match=r"^model\.\S+: the edited weight does not fit float16.*--dtype bfloat16"
    ) as caught:
        surgery.apply(method, base=base, model=aligned, output=tmp_path / "out", options=options)
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "base"]
    wide = surgery.Options(dtype="bfloat16")
    surgery.apply(method, base=base, model=aligned, output=tmp_path / "out", options=wide)  # control


def test_a_copied_tensor_that_overflows_fp16_is_refused_by_name(tmp_path):
    base, aligned = pair(tmp_path, torch.bfloat16, torch.bfloat16, scale=1e6)
    method = surgery.LoX(rank=RANK, include="gate.weight", exclude="embed")
    with pytest.raises(InputError, match=r"does not fit float16"):
        surgery.apply(
            method,
            base=base,
            model=aligned,
            output=tmp_path / "out",
            options=surgery.Options(dtype="float16"),
        )


def test_rows_that_only_aligned_has_are_cast_with_the_rest(tmp_path):
    """A tensor edited in part: the other part is cast, and refused where it does not fit."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 16, generator=generator)
    moved = rows + 0.05 * torch.randn(40, 16, generator=generator)
    base = write_checkpoint(tmp_path / "base", {"embed_tokens.weight": rows[:32]}, {})
    method = surgery.LoX(rank=RANK, alpha=ALPHA, vocab="common-rows")
    half = surgery.Options(dtype="float16")
    aligned = write_checkpoint(tmp_path / "aligned", {"embed_tokens.weight": moved}, {})
    surgery.apply(method, base=base, model=aligned, output=tmp_path / "out", options=half)
    found = read_tensors(tmp_path / "out")["embed_tokens.weight"]
    assert torch.equal(found[32:], moved[32:].half())
    meant = ALPHA * truncated((moved[:32] - rows[:32]).double())
    kept = found[:32].double() - moved[:32].double()
    assert torch.linalg.norm(kept - meant) < 2e-2 * torch.linalg.norm(meant)
    moved[35, 3] = 1e5
    write_checkpoint(tmp_path / "aligned", {"embed_tokens.weight": moved}, {})
    with pytest.raises(InputError, match=r"embed_tokens\.weight does not fit float16"):
        surgery.apply(method, base=base, model=aligned, output=tmp_path / "again", options=half)


FUSED = {
    "model.layers.0.self_attn.qkv_proj.weight": (
        (80, 40),
        {"num_key_value_heads": 2, **CONFIG},
        (40, 20, 20),
    ),
    "model.layers.0.mlp.gate_up_proj.weight": ((50, 40), CONFIG, (25, 25)),
    "model.layers.0.mlp.experts.gate_up_proj": ((4, 50, 40), CONFIG, (25, 25)),
    "model.layers.0.block_sparse_moe.input_linear.weight": (
        (4, 50, 40),
        {"model_type": "granitemoe", "num_local_experts": 4},
        (25, 25),
    ),
    "transformer.h.0.attn.c_attn.weight": ((120, 40), {"model_type": "qwen", **CONFIG}, (40, 40, 40)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_split_fused_edits_each_part_alone_in_every_dtype(tmp_path, name, dtype):
    shape, config, sizes = FUSED[name]
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(shape, generator=generator).to(dtype)
    after = (before.float() + 0.05 * torch.randn(shape, generator=generator)).to(dtype)
    base = write_checkpoint(tmp_path / "base", {name: before}, config)
    aligned = write_checkpoint(tmp_path / "aligned", {name: after}, config)
    method = surgery.LoX(rank=RANK, alpha=ALPHA, split_fused=True)
    surgery.apply(method, base=base, model=aligned, output=tmp_path / "out")
    delta = after.double() - before.double()
    meant = ALPHA * torch.cat([truncated(part) for part in delta.split(sizes, dim=-2)], dim=-2)
    kept = read_tensors(tmp_path / "out")[name].double() - after.double()
    retention = float((kept * meant).sum() / meant.square().sum())
    assert retention == pytest.approx(1, abs=1e-3 if dtype in WIDE else 2e-2)
    assert figures(tmp_path / "out")[name]["retention"] == pytest.approx(retention, abs=3e-3)
    whole = ALPHA * truncated(delta)
    assert torch.linalg.norm(kept - meant) < 0.9 * torch.linalg.norm(
        kept - whole
    )  # control: fused is another edit


def test_interleaved_parts_are_refused_before_anything_is_written(tmp_path):
    name = "model.layers.0.attention.wqkv.weight"
    config = {"model_type": "internlm2", **CONFIG}
    held = {name: torch.randn(80, 40), "model.layers.0.feed_forward.w1.weight": torch.randn(50, 40)}
    base = write_checkpoint(tmp_path / "base", held, config)
    aligned = write_checkpoint(
        tmp_path / "aligned", {key: value + 0.1 for key, value in held.items()}, config
    )
    with pytest.raises(InputError, match=r"wqkv\.weight interleaves.*--split-fused.*--exclude"):
        surgery.apply(
            surgery.LoX(rank=2, split_fused=True), base=base, model=aligned, output=tmp_path / "out"
        )
    method = surgery.LoX(rank=1, split_fused=True, exclude="wqkv")
    outcome = surgery.apply(method, base=base, model=aligned, output=tmp_path / "out")
    assert outcome.plan.steps[name].action == "copy"


def test_layers_of_a_vision_tower_are_not_meant_by_layers(tmp_path):
    names = ("model.language_model.layers.1.mlp.up_proj.weight", "model.visual.blocks.1.mlp.up_proj.weight")
    held = {name: torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) for name in names}
    base = write_checkpoint(tmp_path / "base", held, {})
    aligned = write_checkpoint(tmp_path / "aligned", {name: 1.01 * value for name, value in held.items()}, {})
    outcome = surgery.apply(
        surgery.LoX(rank=1, layers="1:2"), base=base, model=aligned, output=tmp_path / "out"
    )
    assert [step.name for step in outcome.plan.edits] == [names[0]]
    found, after = read_tensors(tmp_path / "out"), read_tensors(aligned)
    assert torch.equal(found[names[1]], after[names[1]])
    assert not torch.equal(found[names[0]], after[names[0]])
