"""LoX on checkpoints whose weights are stored in block-scaled fp8, against float64."""

import json

import fp8_pairs
import pytest
import torch
from fp8_pairs import ALPHA, DOWN, EXPERTS, METHOD, RANK, UP, config, hashes, weight_of
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint.fp8 import quantise
from surgery.checkpoint.quantised import Scaling
from surgery.errors import InputError, UsageError
from surgery.testing import read_tensors, write_checkpoint

# Fixtures are found by name in the module of the tests.
write = fp8_pairs.write


def wanted(base, aligned, name):
    left, values, right = torch.linalg.svd(
        weight_of(aligned, name) - weight_of(base, name), full_matrices=False
    )
    return ALPHA * (left[..., :RANK] * values[..., None, :RANK]) @ right[..., :RANK, :]


def records(output):
    lines = (output / "surgery.tensors.jsonl").read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def assert_edited(base, aligned, output, *, anchor="aligned", retention=5e-3):
    """Every weight against float64: the edit is kept, and the figures are what is measured."""
    for name in (UP, DOWN, EXPERTS):
        meant, record = wanted(base, aligned, name), records(output)[name]
        kept = weight_of(output, name) - weight_of(aligned if anchor == "aligned" else base, name)
        energy = meant.square().sum()
        found = float((kept * meant).sum() / energy)
        assert found == pytest.approx(1, abs=retention), name
        assert record["retention"] == pytest.approx(found, abs=2e-3), name
        noise = float(((kept - meant).square().sum() / energy).sqrt())
        assert record["noise"] == pytest.approx(noise, rel=2e-2, abs=1e-5), name
        assert float((kept * -meant).sum() / energy) < 0  # control: the other sign is another edit


@pytest.mark.parametrize(("shards", "block"), [(1, (128, 128)), (2, (64, 96)), (5, (128, 128))], ids=str)
def test_fp8_stays_fp8_and_the_edit_is_in_it(tmp_path, write, shards, block):
    """With several shards some scales lie in another one than their weight, before it or after it."""
    base, aligned = write("base", block=block), write("aligned", shards=shards, block=block)
    outcome = surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "out")
    found, source = read_tensors(tmp_path / "out"), read_tensors(aligned)
    assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
        name: (one.dtype, one.shape) for name, one in source.items()
    }
    assert_edited(base, aligned, tmp_path / "out")
    step = outcome.plan.steps[f"{UP}_scale_inv"]
    assert (step.action, step.reason) == ("edit", f"scale of {UP}")
    assert outcome.totals["edited"] == 4
    assert records(tmp_path / "out")[UP]["rounding"] == "compensated"
    assert surgery.verify(tmp_path / "out", recompute=True, strict=True).recomputed == "identical"
    if shards > 1:
        files = json.loads((aligned / "model.safetensors.index.json").read_text())["weight_map"]
        assert any(files[name] != files[f"{name}_scale_inv"] for name in (UP, DOWN, EXPERTS))


def test_the_same_bytes_come_out_again_and_from_other_shards(tmp_path, write):
    base, aligned = write("base"), write("aligned")
    for number in (1, 2):
        surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / f"out{number}")
    assert hashes(tmp_path / "out1") == hashes(tmp_path / "out2")
    whole = read_tensors(tmp_path / "out1")
    write("aligned", shards=3)
    (aligned / "model.safetensors").unlink()
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "sharded")
    for name, tensor in read_tensors(tmp_path / "sharded").items():
        assert torch.equal(tensor.view(torch.uint8), whole[name].view(torch.uint8)), name


@pytest.mark.parametrize("anchor", ["aligned", "base"])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("fp8", torch.bfloat16), (torch.bfloat16, "fp8"), ("fp8", "fp8")], ids=str
)
def test_the_output_is_stored_as_the_aligned_checkpoint_is(tmp_path, write, ours, theirs, anchor):
    base, aligned = write("base", stored=theirs, block=(64, 64)), write("aligned", stored=ours)
    method = surgery.LoX(rank=RANK, alpha=ALPHA, anchor=anchor)
    surgery.apply(method, base=base, model=aligned, output=tmp_path / "out")
    assert read_tensors(tmp_path / "out").keys() == read_tensors(aligned).keys()
    assert read_tensors(tmp_path / "out")[UP].dtype == read_tensors(aligned)[UP].dtype
    assert_edited(base, aligned, tmp_path / "out", anchor=anchor, retention=2e-2)
    assert surgery.verify(tmp_path / "out", recompute=True, strict=True).recomputed == "identical"


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_rounding_is_as_asked_and_what_is_lost_is_told(tmp_path, write, rounding):
    base, aligned = write("base"), write("aligned")
    options = surgery.Options(rounding=rounding)
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "out", options=options)
    for name in (UP, DOWN):
        meant, record = wanted(base, aligned, name), records(tmp_path / "out")[name]
        kept = weight_of(tmp_path / "out", name) - weight_of(aligned, name)
        assert record["rounding"] == rounding
        assert record["retention"] == pytest.approx(
            float((kept * meant).sum() / meant.square().sum()), abs=2e-3
        )
        if rounding == "nearest":
            assert record["retention"] < 0.95


def test_full_rank_too(tmp_path, write):
    base, aligned = write("base", stored=torch.float32), write("aligned")
    surgery.apply(surgery.LoX(rank="full", alpha=ALPHA), base=base, model=aligned, output=tmp_path / "out")
    meant = ALPHA * (weight_of(aligned, UP) - weight_of(base, UP))
    kept = weight_of(tmp_path / "out", UP) - weight_of(aligned, UP)
    found = float((kept * meant).sum() / meant.square().sum())
    # Only the edit's length can be corrected, and a small matrix answers in jumps.
    assert found == pytest.approx(1, abs=2e-2)
    assert records(tmp_path / "out")[UP]["retention"] == pytest.approx(found, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_keep_a_narrow_dtype(tmp_path, write, dtype):
    base, aligned = write("base", dtype=dtype), write("aligned", dtype=dtype)
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "out")
    assert read_tensors(tmp_path / "out")[f"{UP}_scale_inv"].dtype == dtype
    assert_edited(base, aligned, tmp_path / "out")


def test_an_edit_of_nothing_is_the_same_file(tmp_path, write):
    base, aligned = write("base"), write("aligned")
    surgery.apply(surgery.LoX(alpha=0.0), base=base, model=aligned, output=tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (aligned / "model.safetensors").read_bytes()
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "edited")  # control
    assert (tmp_path / "edited/model.safetensors").read_bytes() != (
        aligned / "model.safetensors"
    ).read_bytes()


def test_weights_that_are_not_selected_travel_with_their_scales(tmp_path, write):
    base, aligned = write("base"), write("aligned")
    method = surgery.LoX(rank=RANK, exclude="up_proj")
    outcome = surgery.apply(method, base=base, model=aligned, output=tmp_path / "out")
    found, source = read_tensors(tmp_path / "out"), read_tensors(aligned)
    for name in (UP, EXPERTS):
        for one in (name, f"{name}_scale_inv"):
            assert outcome.plan.steps[one].action == "copy"
            assert torch.equal(found[one].view(torch.uint8), source[one].view(torch.uint8))
    assert not torch.equal(found[DOWN].view(torch.uint8), source[DOWN].view(torch.uint8))
    assert surgery.verify(tmp_path / "out").copied == 5


def test_weights_that_alignment_left_unchanged_are_counted_with_their_scales_beside_them(tmp_path, write):
    base, aligned = write("base"), write("aligned")
    held, before = load_file(aligned / "model.safetensors"), load_file(base / "model.safetensors")
    held |= {name: before[name] for name in (UP, f"{UP}_scale_inv")}
    save_file(held, aligned / "model.safetensors", metadata={"format": "pt"})
    outcome = surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "out")
    assert outcome.totals["unchanged"] == 1
    assert records(tmp_path / "out")[f"{UP}_scale_inv"]["action"] == "copy"
    found = read_tensors(tmp_path / "out")
    assert torch.equal(found[UP].view(torch.uint8), held[UP].view(torch.uint8))
    assert surgery.verify(tmp_path / "out", recompute=True, strict=True).recomputed == "identical"


def test_another_dtype_for_fp8_weights_is_refused(tmp_path, write):
    base, aligned = write("base"), write("aligned")
    with pytest.raises(UsageError, match=r"dtype is bfloat16.*fp8.*leave out --dtype"):
        surgery.prepare(
            METHOD, base=base, model=aligned, output=tmp_path / "o", options=surgery.Options(dtype="bfloat16")
        )
    aligned = write("aligned", stored=torch.bfloat16)
    surgery.prepare(
        METHOD, base=base, model=aligned, output=tmp_path / "o", options=surgery.Options(dtype="float32")
    )


@pytest.mark.parametrize(
    ("tensor", "value", "side"), [(UP, 0x7F, "base"), (DOWN, 0xFF, "base"), (UP, 0xFF, "aligned")]
)
@pytest.mark.parametrize("method", [METHOD, surgery.LoX(rank=2, include="experts")], ids=["edited", "copied"])
def test_a_code_that_is_no_number_is_refused_by_name(tmp_path, write, tensor, value, side, method):
    base, aligned = write("base"), write("aligned")
    file = (base if side == "base" else aligned) / "model.safetensors"
    held = load_file(file)
    held[tensor].view(torch.uint8)[3, 4] = value
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{tensor} in the {side} checkpoint holds NaN"):
        surgery.apply(method, base=base, model=aligned, output=tmp_path / "out")


def test_infinite_scales_are_refused_by_name(tmp_path, write):
    base, aligned = write("base"), write("aligned")
    held = load_file(aligned / "model.safetensors")
    held[f"{UP}_scale_inv"][0, 0] = float("inf")
    save_file(held, aligned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{UP}_scale_inv in the aligned checkpoint holds NaN or infinity"):
        surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "out")


def test_parts_of_a_fused_matrix_are_edited_alone_where_blocks_end_with_them(tmp_path):
    name = "model.layers.0.mlp.gate_up_proj.weight"
    for rows, block, fits in ((256, (128, 128), True), (160, (128, 128), False)):
        folder = tmp_path / str(rows)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, 150, generator=generator) * 0.02
        for side in ("base", "aligned"):
            scaled = quantise(weight, torch.float32, Scaling("s", block))
            held = {name: scaled.codes, f"{name}_scale_inv": scaled.scales}
            write_checkpoint(folder / side, held, {"hidden_size": 150, **config(block)})
            weight = weight + torch.randn(rows, 150, generator=generator) * 2e-3
        method = surgery.LoX(rank=RANK, alpha=ALPHA, split_fused=True)
        if not fits:
            with pytest.raises(InputError, match=r"gate_up_proj\.weight is in fp8.*--split-fused"):
                surgery.apply(method, base=folder / "base", model=folder / "aligned", output=folder / "out")
            continue
        surgery.apply(method, base=folder / "base", model=folder / "aligned", output=folder / "out")
        kept = weight_of(folder / "out", name) - weight_of(folder / "aligned", name)
        delta = weight_of(folder / "aligned", name) - weight_of(folder / "base", name)
        meant = torch.cat([truncated(part) for part in delta.split(rows // 2)])
        assert float((kept * meant).sum() / meant.square().sum()) == pytest.approx(1, abs=1e-2)
        whole = truncated(delta)
        assert float(torch.linalg.norm(whole - meant) / torch.linalg.norm(meant)) > 0.1  # control
        assert surgery.verify(folder / "out", recompute=True, strict=True).recomputed == "identical"


def truncated(delta):
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return ALPHA * (left[:, :RANK] * values[:RANK]) @ right[:RANK]
