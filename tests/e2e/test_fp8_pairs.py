"""LoX on checkpoints whose weights are stored in block-scaled fp8, against float64."""

import json
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint.fp8 import quantise
from surgery.checkpoint.layout import open_checkpoint
from surgery.checkpoint.quantised import Scaling, scalings
from surgery.checkpoint.reader import Reader, file_sha256
from surgery.editing import Editor
from surgery.errors import CheckError, InputError, UsageError
from surgery.testing import aligned_like, perturbed_copy, read_tensors, tiny_model, write_checkpoint

SIZE = 200, 300
RANK, ALPHA = 4, 1.5
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
EXPERTS = "model.layers.1.mlp.experts.up_proj"
METHOD = surgery.LoX(rank=RANK, alpha=ALPHA)


def config(block=(128, 128), **more):
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **more}
    return {"num_experts": 3, "quantization_config": {**settings, "weight_block_size": list(block)}}


def numbers(aligned):
    """The weights of one side in float32, the same for both but for a change of low rank over noise."""
    result = {}
    for seed, (name, shape) in enumerate({UP: SIZE, DOWN: SIZE[::-1], EXPERTS: (3, 140, 150)}.items()):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(shape, generator=generator) * 0.02
        left = torch.randn(*shape[:-1], 4, generator=generator)
        right = torch.randn(*shape[:-2], 4, shape[-1], generator=generator)
        noise = torch.randn(shape, generator=generator)
        result[name] = weight + (2e-4 * left @ right + 2e-4 * noise if aligned else 0)
    return result


def tensors(aligned, *, stored="fp8", block=(128, 128), dtype=torch.float32):
    found = {
        "model.norm.weight": torch.ones(8),
        "lm_head.weight": torch.full((4, 8), 1.0 + aligned).bfloat16(),
    }
    for name, weight in numbers(aligned).items():
        if stored == "fp8":
            scaled = quantise(weight, dtype, Scaling("s", block))
            found |= {f"{name}_scale_inv": scaled.scales, name: scaled.codes}
        else:
            found[name] = weight.to(stored)
    return found


@pytest.fixture
def write(tmp_path):
    """Write a side of a pair; the name of the folder decides which."""

    def one(side, *, shards=1, stored="fp8", block=(128, 128), dtype=torch.float32, **settings):
        held = tensors(side == "aligned", stored=stored, block=block, dtype=dtype)
        described = config(block, **settings) if stored == "fp8" else {"num_experts": 3}
        return write_checkpoint(tmp_path / side, held, described, shards=shards)

    return one


def weight_of(folder, name):
    """A weight of a checkpoint in float64, by its own scales."""
    checkpoint, held = open_checkpoint(folder, folder.name), read_tensors(folder)
    scaling = scalings(checkpoint).get(name)
    if scaling is None:
        return held[name].double()
    height, width = scaling.block
    scales = held[scaling.name].double().repeat_interleave(height, -2).repeat_interleave(width, -1)
    return held[name].double() * scales[..., : held[name].shape[-2], : held[name].shape[-1]]


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


def hashes(output):
    return {
        name: entry["sha256"]
        for name, entry in json.loads((output / "surgery.json").read_text())["files"].items()
    }


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


def test_codes_and_scales_fit_each_other_whichever_is_asked_for_first_and_by_whom(tmp_path, write):
    base, aligned = write("base"), write("aligned")
    job = surgery.prepare(METHOD, base=base, model=aligned, output=tmp_path / "out")
    codes, scales = job.plan.steps[UP], job.plan.steps[f"{UP}_scale_inv"]
    orders = [(codes, scales), (scales, codes), (codes, codes, scales), (scales, scales, codes)]
    found = []
    with Reader(job.aligned) as ours, Reader(job.base) as theirs:
        for order in orders:
            editor = Editor(job.method, job.options, ours, theirs)
            found.append({step.name: editor.edit(step).tensor for step in order})
        found += together(Editor(job.method, job.options, ours, theirs), codes, scales)
    for each in found[1:]:
        for name, tensor in each.items():
            assert torch.equal(tensor.view(torch.uint8), found[0][name].view(torch.uint8))


def together(editor, *steps):
    """Edits of all steps on a thread each, begun at once, a few times over."""
    rounds = []
    for _ in range(3):
        results, start = {}, threading.Barrier(len(steps))

        def work(step, results=results, start=start):
            start.wait()
            results[step.name] = editor.edit(step).tensor

        threads = [threading.Thread(target=work, args=(step,)) for step in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == len(steps)
        rounds.append(results)
    return rounds


def test_an_edit_is_computed_once_for_both_of_its_tensors(tmp_path, write, monkeypatch):
    base, aligned = write("base"), write("aligned", shards=3)
    seen, update = [], surgery.LoX.update
    monkeypatch.setattr(
        surgery.LoX,
        "update",
        lambda self, *pair, name, seed: seen.append(name) or update(self, *pair, name=name, seed=seed),
    )
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "out")
    assert sorted(seen) == sorted({UP, DOWN, EXPERTS, "lm_head.weight"})


def test_factors_that_would_take_too_much_memory_are_computed_anew(tmp_path, write, monkeypatch):
    base, aligned = write("base"), write("aligned")
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "kept")
    monkeypatch.setattr("surgery.editing_fp8.LARGEST_KEPT", 0)
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "anew")
    assert hashes(tmp_path / "kept") == hashes(tmp_path / "anew")


def test_a_code_two_steps_away_is_another_edit_and_one_step_is_not(tmp_path, write):
    base, aligned = write("base"), write("aligned")
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "out")
    move_a_code(tmp_path / "out")
    assert surgery.verify(tmp_path / "out", recompute=True).recomputed == "equivalent"
    with pytest.raises(CheckError, match=r"--strict"):
        surgery.verify(tmp_path / "out", recompute=True, strict=True)
    move_a_code(tmp_path / "out")
    with pytest.raises(CheckError, match=UP):
        surgery.verify(tmp_path / "out", recompute=True)


@pytest.mark.parametrize(("factor", "verdict"), [(1 + 2e-6, "equivalent"), (1.001, None)])
def test_a_scale_may_differ_in_its_last_places_only(tmp_path, write, factor, verdict):
    base, aligned = write("base"), write("aligned")
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "out")
    restate(tmp_path / "out", lambda held: held[f"{UP}_scale_inv"].mul_(factor))
    if verdict:
        assert surgery.verify(tmp_path / "out", recompute=True).recomputed == verdict
        return
    with pytest.raises(CheckError, match=f"{UP}_scale_inv"):
        surgery.verify(tmp_path / "out", recompute=True)


def move_a_code(output):
    """Move one entry to the next larger code."""
    restate(output, lambda held: held[UP].view(torch.uint8)[5, 5].add_(1))


def restate(output, change):
    """Change the stored tensors and bring the manifest's hash in line."""
    file = output / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})
    manifest = json.loads((output / "surgery.json").read_text())
    manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    (output / "surgery.json").write_text(json.dumps(manifest))


def test_an_adapter_on_fp8_weights_is_refused(tmp_path, write):
    from surgery.adapter import _refuse_fp8

    base, aligned = write("base"), write("aligned")
    job = surgery.prepare(METHOD, base=base, model=aligned, output=tmp_path / "out")
    for name in (UP, f"{UP}_scale_inv"):
        with pytest.raises(InputError, match=rf"{UP} is stored in fp8.*--as-lora"):
            _refuse_fp8(job.plan.steps[name])
    _refuse_fp8(job.plan.steps["lm_head.weight"])


def test_what_loads_the_source_loads_the_output(tmp_path, write):
    """Metadata, names, order and config are the source's own."""
    base, aligned = write("base"), write("aligned")
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "out")
    with (
        safe_open(aligned / "model.safetensors", "pt") as one,
        safe_open(tmp_path / "out/model.safetensors", "pt") as other,
    ):
        assert list(one.keys()) == list(other.keys())
        assert one.metadata() == other.metadata()
    assert (tmp_path / "out/config.json").read_bytes() == (aligned / "config.json").read_bytes()


def in_fp8(folder, source, block):
    """A checkpoint that transformers saved, its projections in fp8."""
    held = {}
    for name, tensor in read_tensors(source).items():
        held[name] = tensor
        if "proj" in name:
            scaled = quantise(tensor, torch.float32, Scaling("s", block))
            held |= {name: scaled.codes, f"{name}_scale_inv": scaled.scales}
    described = json.loads((source / "config.json").read_text()) | config(
        block, modules_to_not_convert=["lm_head"]
    )
    return write_checkpoint(folder, held, described)


def test_transformers_dequantises_the_output_to_the_same_numbers(tmp_path):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    block = (8, 8)  # its reader asks for whole blocks
    source = tiny_model(tmp_path / "source")
    changed = perturbed_copy(source, tmp_path / "changed", change=lambda *one: aligned_like(*one, size=5e-2))
    base, aligned = in_fp8(tmp_path / "base", source, block), in_fp8(tmp_path / "aligned", changed, block)
    surgery.apply(METHOD, base=base, model=aligned, output=tmp_path / "out")
    wide = FineGrainedFP8Config(dequantize=True, weight_block_size=block, modules_to_not_convert=["lm_head"])
    loaded = [
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=wide, dtype=torch.float32
        ).state_dict()
        for folder in (tmp_path / "out", aligned)
    ]
    names = [name for name in read_tensors(aligned) if "proj" in name and name.endswith("weight")]
    for name in names:
        assert torch.equal(loaded[0][name].double(), weight_of(tmp_path / "out", name).float().double()), name
        assert not torch.equal(loaded[0][name], loaded[1][name]), name  # control
    assert len(names) == 14
