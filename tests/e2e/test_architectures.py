"""LoX on files of several architectures: edited tensor by tensor as the equation says, reloaded, generating."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import surgery
from surgery.errors import InputError
from surgery.selection import kind_of
from surgery.testing import perturbed_copy, read_tensors, tiny_model, tiny_pair, write_checkpoint

CASES = [
    ("llama", False),
    ("llama-tied", False),
    ("gpt2", False),
    ("mixtral", False),
    ("mixtral", True),
    ("qwen2_moe", False),
    ("qwen2_moe", True),
    ("qwen3_moe", True),
]


def truncated(delta, rank):
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


def figures(output):
    lines = (output / "surgery.tensors.jsonl").read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def assert_equation_holds(base, aligned, output, *, alpha=1.5, rank=6):
    """Every tensor of a float32 output against float64; returns the names of the edited ones."""
    before, after, found = read_tensors(base), read_tensors(aligned), read_tensors(output)
    assert found.keys() == after.keys()
    records = figures(output)
    for name, tensor in found.items():
        if records[name]["action"] != "edit":
            assert torch.equal(tensor, after[name].float()), name
            continue
        delta = after[name].double() - before[name].double()
        wanted = alpha * truncated(delta, min(rank, *delta.shape[-2:]))
        stored = tensor.double() - after[name].double()
        rounding = 2.0**-24 * torch.linalg.vector_norm(tensor.double())
        bound = records[name]["certified_error"] * torch.linalg.vector_norm(wanted) + rounding
        assert torch.linalg.vector_norm(stored - wanted) <= bound, name
        assert torch.linalg.vector_norm(stored - 1.001 * wanted) > bound, name  # control
    return {name for name, record in records.items() if record["action"] == "edit"}


@pytest.mark.parametrize(("architecture", "fused"), CASES, ids=lambda value: str(value))
def test_every_tensor_is_what_the_equation_says_and_the_model_generates(tmp_path, architecture, fused):
    base, aligned = tiny_pair(tmp_path, architecture, fused=fused)
    method = surgery.LoX(rank=6, alpha=1.5)
    wide = surgery.Options(dtype="float32")
    surgery.apply(method, base=base, model=aligned, output=tmp_path / "wide", options=wide)
    edited = assert_equation_holds(base, aligned, tmp_path / "wide")
    outcome = surgery.apply(method, base=base, model=aligned, output=tmp_path / "out")
    large = [record for record in outcome.records if record.get("changed", 0) > 2000]
    assert large
    assert all(abs(record["retention"] - 1) < 0.011 for record in large)
    matrices = {name for name, tensor in read_tensors(aligned).items() if tensor.ndim >= 2}
    assert edited == matrices
    assert outcome.totals["edited"] == len(matrices)
    if fused:
        assert any(tensor.ndim == 3 for tensor in read_tensors(aligned).values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    prompt = torch.tensor([[5, 9, 2]])
    generated = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert generated.shape[1] > 3
    moved = (model(prompt).logits - reference(prompt).logits).abs().max()
    assert 0 < moved < 10


def test_tied_embeddings_are_edited_once_as_stored(tmp_path):
    base, aligned = tiny_pair(tmp_path, "llama-tied")
    surgery.apply(surgery.LoX(), base=base, model=aligned, output=tmp_path / "out")
    assert "lm_head.weight" not in read_tensors(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_router_of_one_row_has_its_rank_capped_and_told(tmp_path):
    base, aligned = tiny_pair(tmp_path, "qwen2_moe")
    outcome = surgery.apply(surgery.LoX(rank=6), base=base, model=aligned, output=tmp_path / "out")
    step = outcome.plan.steps["model.layers.0.mlp.shared_expert_gate.weight"]
    assert (step.rank, step.action) == (1, "edit")
    assert "capped at 1" in step.reason
    assert figures(tmp_path / "out")[step.name]["rank"] == 1


def test_linear_leaves_out_embeddings_heads_and_routers(tmp_path):
    base, aligned = tiny_pair(tmp_path, "qwen2_moe")
    job = surgery.prepare(surgery.LoX(edit="linear"), base=base, model=aligned, output=tmp_path / "out")
    left_out = {name for name, step in job.plan.steps.items() if "--edit linear" in step.reason}
    assert left_out == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(f"model.layers.{n}.mlp.{gate}.weight" for n in (0, 1) for gate in ("gate", "shared_expert_gate")),
    }


def test_tensors_that_only_the_aligned_model_has_travel_byte_for_byte(tmp_path):
    base, aligned = tiny_pair(tmp_path, "llama")
    tensors = load_file(aligned / "model.safetensors")
    extra = {"mtp.0.proj.weight": torch.randn(8, 8), "mtp.0.norm.weight": torch.randn(8)}
    save_file(tensors | extra, aligned / "model.safetensors", metadata={"format": "pt"})
    surgery.apply(surgery.LoX(), base=base, model=aligned, output=tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())


def test_a_layer_that_only_the_aligned_model_has_is_an_error(tmp_path):
    base, aligned = tiny_pair(tmp_path, "llama")
    tensors = load_file(aligned / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.randn(8, 8)
    save_file(tensors, aligned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.up_proj\.weight.*--exclude"):
        surgery.apply(surgery.LoX(), base=base, model=aligned, output=tmp_path / "out")
    method = surgery.LoX(exclude=r"layers\.2\.")
    surgery.apply(method, base=base, model=aligned, output=tmp_path / "out")


def test_an_unknown_architecture_needs_no_model_class(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {"enc.w": torch.randn(20, 30, generator=generator), "enc.conv1d.w": torch.randn(8, 1, 4)}
    base = write_checkpoint(tmp_path / "base", tensors, {"model_type": "made-up"})
    aligned = perturbed_copy(base, tmp_path / "aligned")
    outcome = surgery.apply(surgery.LoX(), base=base, model=aligned, output=tmp_path / "out")
    assert outcome.plan.steps["enc.conv1d.w"].reason == "other shape"
    assert outcome.plan.steps["enc.w"].action == "edit"


def test_unchanged_tensors_are_copied_counted_and_named(tmp_path):
    base = tiny_model(tmp_path / "base", "llama")
    kept = "model.layers.1.mlp.up_proj.weight"
    tensors = read_tensors(base)
    aligned = perturbed_copy(base, tmp_path / "aligned")
    changed = load_file(aligned / "model.safetensors") | {kept: tensors[kept]}
    save_file(changed, aligned / "model.safetensors", metadata={"format": "pt"})
    outcome = surgery.apply(surgery.LoX(), base=base, model=aligned, output=tmp_path / "out")
    assert outcome.totals["unchanged"] == 1
    assert json.loads((tmp_path / "out/surgery.json").read_text())["unchanged"] == [kept]
    assert torch.equal(read_tensors(tmp_path / "out")[kept], tensors[kept])


@pytest.mark.parametrize("policy", ["common-rows", "skip"])
def test_a_grown_vocabulary_is_handled_as_asked(tmp_path, policy):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 16, generator=generator)
    body = {"layers.0.proj.weight": torch.randn(16, 16, generator=generator)}
    base = write_checkpoint(tmp_path / "base", {"embed_tokens.weight": rows[:32], **body}, {})
    moved = {"embed_tokens.weight": rows + 0.01 * torch.randn(40, 16, generator=generator)}
    moved["layers.0.proj.weight"] = body["layers.0.proj.weight"] + 0.01
    aligned = write_checkpoint(tmp_path / "aligned", moved, {})
    with pytest.raises(InputError, match=r"embed_tokens\.weight.*--vocab"):
        surgery.apply(surgery.LoX(rank=2), base=base, model=aligned, output=tmp_path / "out")
    method = surgery.LoX(rank=2, vocab=policy)
    outcome = surgery.apply(method, base=base, model=aligned, output=tmp_path / "out")
    found = read_tensors(tmp_path / "out")["embed_tokens.weight"]
    assert torch.equal(found[32:], moved["embed_tokens.weight"][32:])
    assert torch.equal(found[:32], moved["embed_tokens.weight"][:32]) is (policy == "skip")
    assert any("embed_tokens.weight" in note and "32" in note for note in outcome.plan.notes)
    if policy == "common-rows":
        delta = (moved["embed_tokens.weight"][:32] - rows[:32]).double()
        edit = (found[:32] - moved["embed_tokens.weight"][:32]).double()
        assert torch.linalg.norm(edit - 1.25 * truncated(delta, 2)) < 1e-4 * torch.linalg.norm(edit)


def test_prefixes_are_paired_and_the_output_keeps_the_aligned_names(tmp_path):
    base, aligned = tiny_pair(tmp_path, "llama")
    wrapped = {f"language_model.{name}": tensor for name, tensor in read_tensors(base).items()}
    save_file(wrapped, base / "model.safetensors", metadata={"format": "pt"})
    outcome = surgery.apply(surgery.LoX(), base=base, model=aligned, output=tmp_path / "out")
    assert any("language_model." in note for note in outcome.plan.notes)
    assert read_tensors(tmp_path / "out").keys() == read_tensors(aligned).keys()


@pytest.mark.parametrize(
    ("name", "shape", "config", "parts"),
    [
        ("h.0.attn.c_attn.weight", (16, 48), {"model_type": "gpt2"}, [(16, 16)] * 3),
        (
            "layers.0.self_attn.qkv_proj.weight",
            (32, 16),
            {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16},
            [(16, 16), (8, 16), (8, 16)],
        ),
        ("layers.0.mlp.gate_up_proj.weight", (40, 16), {"hidden_size": 16}, [(20, 16)] * 2),
        (
            "layers.0.mlp.experts.gate_up_proj",
            (3, 40, 16),
            {"hidden_size": 16, "num_experts": 3},
            [(3, 20, 16)] * 2,
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_split_fused_edits_each_part_as_a_matrix(tmp_path, name, shape, config, parts):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(shape, generator=generator)
    after = before + 0.01 * torch.randn(shape, generator=generator)
    base = write_checkpoint(tmp_path / "base", {name: before}, config)
    aligned = write_checkpoint(tmp_path / "aligned", {name: after}, config)
    surgery.apply(surgery.LoX(rank=2, split_fused=True), base=base, model=aligned, output=tmp_path / "out")
    edit = (read_tensors(tmp_path / "out")[name] - after).double()
    axis = next(axis for axis in range(-2, 0) if sum(part[axis] for part in parts) == shape[axis])
    split = torch.split((after - before).double(), [part[axis] for part in parts], dim=axis)
    expected = 1.25 * torch.cat([truncated(part, 2) for part in split], dim=axis)
    assert torch.linalg.norm(edit - expected) < 1e-4 * torch.linalg.norm(expected)
    whole = 1.25 * truncated((after - before).double(), 2)
    assert torch.linalg.norm(edit - whole) > 0.1 * torch.linalg.norm(
        whole
    )  # control: split differs from fused


def test_fused_matrices_whose_parts_are_unknown_are_refused_by_name(tmp_path):
    name = "layers.0.attention.query_key_value.weight"
    base = write_checkpoint(tmp_path / "base", {name: torch.randn(48, 16)}, {"model_type": "gpt_neox"})
    aligned = perturbed_copy(base, tmp_path / "aligned")
    with pytest.raises(InputError, match=r"query_key_value\.weight interleaves"):
        surgery.prepare(surgery.LoX(split_fused=True), base=base, model=aligned, output=tmp_path / "out")


def test_kinds_are_read_from_names(tmp_path):
    from surgery.checkpoint.layout import open_checkpoint

    base = tiny_model(tmp_path / "m", "qwen2_moe", fused=True)
    checkpoint = open_checkpoint(base, "m")
    kinds = {name: kind_of(info, checkpoint.config) for name, info in checkpoint.tensors.items()}
    assert kinds["model.layers.0.mlp.experts.gate_up_proj"] == "experts"
    assert kinds["model.layers.0.mlp.gate.weight"] == "router"
    assert kinds["model.layers.0.self_attn.o_proj.weight"] == "matrix"
    assert kinds["lm_head.weight"] == "head"
    assert kinds["model.norm.weight"] == "vector"
