"""Plans from headers alone: fp8 and its scales, tensors that one side lacks, and shapes beyond 2^31 entries."""

import json
import math

import pytest
import torch
from safetensors.torch import save

from surgery.checkpoint.header import build_header
from surgery.checkpoint.layout import open_checkpoint
from surgery.checkpoint.reader import Reader
from surgery.errors import InputError, UsageError
from surgery.methods.lox import LoX
from surgery.plan import output_size, plan_steps
from surgery.testing import write_checkpoint

SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I64": 8}


def sparse(folder, tensors, config=None):
    """A checkpoint whose file has a header and a length, and no data on the disk."""
    folder.mkdir()
    rows = [(name, code, shape, math.prod(shape) * SIZES[code]) for name, (code, shape) in tensors.items()]
    header = build_header(rows, {"format": "pt"})
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(row[3] for row in rows))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return open_checkpoint(folder, folder.name)


def planned(tmp_path, aligned, base, method=None, *, config=None, dtype="keep"):
    sides = sparse(tmp_path / "aligned", aligned, config), sparse(tmp_path / "base", base, config)
    return plan_steps(method or LoX(rank=2), *sides, dtype=dtype)


BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
PLAIN = {"layers.0.up_proj.weight": ("BF16", (20, 30)), "layers.0.norm.weight": ("BF16", (20,))}
SCALED = {
    "layers.0.gate_proj.weight_scale_inv": ("F32", (2, 3)),
    "layers.0.gate_proj.weight": ("F8_E4M3", (200, 300)),
}


def test_scales_are_accounted_for_wherever_they_stand_and_are_no_matrices(tmp_path):
    steps, notes = planned(tmp_path, PLAIN | SCALED, PLAIN | SCALED, config=BLOCKS)
    scales, weight = steps["layers.0.gate_proj.weight_scale_inv"], steps["layers.0.gate_proj.weight"]
    assert (scales.action, scales.reason, scales.dtype, scales.rank) == (
        "edit",
        "scale of layers.0.gate_proj.weight",
        "F32",
        None,
    )
    assert scales.weight is weight
    assert (weight.action, weight.reason, weight.dtype, weight.rank) == ("edit", "matrix", "F8_E4M3", 2)
    assert weight.scaling == weight.base_scaling
    assert notes == ()
    assert list(steps) == list(PLAIN | SCALED)


@pytest.mark.parametrize("side", ["aligned", "base"])
def test_scales_that_one_side_has_need_no_partner(tmp_path, side):
    wide = PLAIN | {"layers.0.gate_proj.weight": ("BF16", (200, 300))}
    held = {"aligned": wide, "base": wide} | {side: PLAIN | SCALED}
    steps, notes = planned(tmp_path, held["aligned"], held["base"], config=BLOCKS)
    weight = steps["layers.0.gate_proj.weight"]
    assert (weight.scaling is not None, weight.base_scaling is not None) == (
        side == "aligned",
        side == "base",
    )
    assert weight.action == "edit"
    assert notes == ()


def test_nothing_but_scales_selected_is_nothing_selected(tmp_path):
    with pytest.raises(UsageError, match="select no tensor"):
        planned(tmp_path, PLAIN | SCALED, PLAIN | SCALED, LoX(include="scale_inv"), config=BLOCKS)


ADDED = {
    "layers.0.up_proj.bias": ("BF16", (20,)),
    "layers.0.conv.weight": ("BF16", (8, 1, 4)),
    "layers.0.down_proj.weight": ("BF16", (20, 30)),
}


@pytest.mark.parametrize("name", ADDED)
def test_what_only_aligned_has_in_a_module_of_both_is_an_error_until_it_is_named(tmp_path, name):
    aligned = PLAIN | {name: ADDED[name]}
    with pytest.raises(InputError, match=rf"{name}.*--exclude"):
        planned(tmp_path, aligned, PLAIN)
    (tmp_path / "named").mkdir()
    steps, notes = planned(tmp_path / "named", aligned, PLAIN, LoX(rank=2, exclude=name))
    assert steps[name].action == "copy"
    assert notes == (f"only the aligned checkpoint has 1 of its tensors, first {name}: copied as they are",)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("layers.0.self_attn.rotary_emb.inv_freq", ("F32", (4,))),
        ("layers.0.position_ids", ("I64", (9,))),
        ("layers.0.up_proj.input_scale", ("F32", ())),
        ("mtp.0.norm.weight", ("BF16", (20,))),
        ("vision_tower.blocks.0.norm.bias", ("BF16", (20,))),
    ],
)
def test_buffers_and_wholly_new_modules_are_copied_with_a_note(tmp_path, name, tensor):
    steps, notes = planned(tmp_path, PLAIN | {name: tensor}, PLAIN)
    assert steps[name].action == "copy"
    assert len(notes) == 1
    assert name in notes[0]


def test_a_pair_without_such_tensors_has_no_note(tmp_path):
    assert planned(tmp_path, PLAIN, PLAIN)[1] == ()


# 70000 * 40000 = 2.8e9 entries, 5.6e9 bytes: beyond 2^31 entries and beyond 2^32 bytes.
HUGE = {"embed_tokens.weight": ("BF16", (70000, 40000)), "layers.0.up_proj.weight": ("BF16", (20, 30))}


def test_tensors_of_more_than_two_to_the_31_entries_are_planned(tmp_path):
    steps, _ = planned(tmp_path, HUGE, HUGE, LoX(rank=64))
    step = steps["embed_tokens.weight"]
    assert (step.action, step.rank, output_size(step)) == ("edit", 64, 5_600_000_000)
    assert output_size(step) > 2**32 > 2**31
    steps, _ = plan_steps(
        LoX(rank=2),
        open_checkpoint(tmp_path / "aligned", "aligned"),
        open_checkpoint(tmp_path / "base", "base"),
        dtype="float32",
    )
    assert output_size(steps["embed_tokens.weight"]) == 11_200_000_000


def test_stacks_of_experts_beyond_two_to_the_31_entries_are_planned(tmp_path):
    experts = {"layers.0.mlp.experts.gate_up_proj": ("F8_E4M3", (256, 4096, 7168))}
    scales = {"layers.0.mlp.experts.gate_up_proj_scale_inv": ("F32", (256, 32, 56))}
    config = BLOCKS | {"n_routed_experts": 256, "hidden_size": 7168}
    steps, _ = planned(
        tmp_path, scales | experts, scales | experts, LoX(rank=3, split_fused=True), config=config
    )
    step = steps["layers.0.mlp.experts.gate_up_proj"]
    assert output_size(step) == 7_516_192_768
    assert [part.shape(step.shape) for part in step.slices] == [(256, 2048, 7168)] * 2


def test_a_tensor_beyond_two_to_the_32_bytes_into_its_file_is_read(tmp_path):
    checkpoint = sparse(tmp_path / "huge", HUGE)
    value = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    info = checkpoint.tensors["layers.0.up_proj.weight"]
    assert info.start > 2**32
    with open(tmp_path / "huge/model.safetensors", "r+b") as file:
        file.seek(info.start)
        file.write(save({"x": value})[-value.nbytes :])
    with Reader(checkpoint) as reader:
        assert torch.equal(reader.read(info.name), value)
        assert b"".join(reader.raw(info.name, chunk=100)) == save({"x": value})[-value.nbytes :]
        first = next(reader.raw("embed_tokens.weight", chunk=64))
    assert bytes(first) == bytes(64)  # control: the start of the file holds nothing


def test_one_side_may_be_written_and_the_other_sparse(tmp_path):
    written = write_checkpoint(tmp_path / "w", {"layers.0.up_proj.weight": torch.ones(20, 30)}, {})
    other = sparse(tmp_path / "base", {"layers.0.up_proj.weight": ("BF16", (20, 30))})
    steps, _ = plan_steps(LoX(rank=2), open_checkpoint(written, "w"), other, dtype="keep")
    assert steps["layers.0.up_proj.weight"].dtype == "F32"
