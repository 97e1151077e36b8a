"""Codes and scales of block-scaled fp8 belong together: computed once, verified together, read by transformers."""

import json
import threading

import fp8_pairs
import pytest
import torch
from fp8_pairs import DOWN, EXPERTS, METHOD, UP, config, hashes, weight_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint.fp8 import quantise
from surgery.checkpoint.quantised import Scaling
from surgery.checkpoint.reader import Reader, file_sha256
from surgery.editing import Editor
from surgery.errors import CheckError, InputError
from surgery.testing import aligned_like, perturbed_copy, read_tensors, tiny_model, write_checkpoint

# Fixtures are found by name in the module of the tests.
write = fp8_pairs.write


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
