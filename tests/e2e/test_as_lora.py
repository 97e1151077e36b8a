"""`--as-lora`: PEFT loads the adapter on its anchor, and the logits are those of the full-precision edit."""

import dataclasses
import hashlib
import json
import math

import pytest
import torch
from as_lora import ALPHA, write
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import surgery
from surgery import adapter, pipeline
from surgery.checkpoint.staging import partial_of
from surgery.errors import InputError, Interrupted
from surgery.methods.lox import LoX
from surgery.options import Options
from surgery.testing import (
    ARCHITECTURES,
    perturbed_copy,
    read_tensors,
    tiny_model,
    tiny_pair,
    write_checkpoint,
)

pytestmark = [
    # PEFT 0.21 reads an attribute that transformers 5.23 renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


IDS = torch.randint(2, 120, (3, 17), generator=torch.Generator().manual_seed(5))


# Float32 logits of two ways to add the same numbers differ by a few units of rounding per layer.
UNITS = 64 * 2.0**-24


def truncated(delta, rank=6):
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


def reference(base, aligned, outcome, folder, *, anchor="aligned", parts=lambda name, delta: [delta]):
    """A checkpoint with the equation computed in float64; what is not edited comes from the aligned checkpoint."""
    before, after = read_tensors(base), read_tensors(aligned)
    edited = {record["name"] for record in outcome.records if record["action"] == "edit"}
    assert edited
    tensors = {}
    for name, tensor in after.items():
        start = (after if anchor == "aligned" else before)[name].double()
        delta = tensor.double() - before[name].double() if name in edited else None
        edit = 0 if delta is None else ALPHA * torch.cat([truncated(part) for part in parts(name, delta)], -1)
        tensors[name] = (start + edit if name in edited else tensor).float()
    return write_checkpoint(folder, tensors, json.loads((aligned / "config.json").read_text()))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def assert_adapter_is_the_edit(anchor_folder, wanted_folder, output):
    """Unmerged, merged; controls: without the adapter, and with another scaling."""
    anchor = load(anchor_folder)
    plain, wanted = logits(anchor), logits(load(wanted_folder))
    tolerance = UNITS * float(wanted.abs().max())
    adapted = PeftModel.from_pretrained(anchor, output).eval()
    layers = [layer for layer in adapted.modules() if isinstance(layer, LoraLayer)]
    assert {scaling for layer in layers for scaling in layer.scaling.values()} == {1.0}
    assert float((logits(adapted) - wanted).abs().max()) < tolerance
    with adapted.disable_adapter():
        assert float((logits(adapted) - plain).abs().max()) < tolerance
        assert float((logits(adapted) - wanted).abs().max()) > 50 * tolerance
    for layer in layers:
        layer.set_scale("default", 1.1)
    assert float((logits(adapted) - wanted).abs().max()) > 3 * tolerance
    for layer in layers:
        layer.set_scale("default", 1.0)
    assert float((logits(adapted.merge_and_unload()) - wanted).abs().max()) < tolerance


CASES = [
    ("llama", "aligned", False),
    ("llama", "base", False),
    ("llama-tied", "aligned", False),
    ("llama-tied", "base", False),
    ("gpt2", "aligned", False),
    ("mixtral", "aligned", False),
    ("mixtral", "base", True),
    ("qwen2_moe", "aligned", True),
    ("qwen3_moe", "aligned", False),
]


@pytest.mark.parametrize(("architecture", "anchor", "fused"), CASES, ids=lambda value: str(value))
def test_logits_with_the_adapter_are_those_of_the_full_precision_edit(tmp_path, architecture, anchor, fused):
    base, aligned = tiny_pair(tmp_path, architecture, fused=fused)
    outcome = write(base, aligned, tmp_path / "out", anchor=anchor)
    wanted = reference(base, aligned, outcome, tmp_path / "wanted", anchor=anchor)
    assert_adapter_is_the_edit(base if anchor == "base" else aligned, wanted, tmp_path / "out")


def test_a_float32_pair_with_capped_ranks_is_exact(tmp_path):
    def widened(tensor, generator):
        return tensor.float() + 1e-3 * torch.randn(tensor.shape, generator=generator)

    base = perturbed_copy(tiny_model(tmp_path / "half", "qwen2_moe"), tmp_path / "base", change=widened)
    aligned = perturbed_copy(base, tmp_path / "aligned", seed=3)
    outcome = write(base, aligned, tmp_path / "out")
    ranks = {record["rank"] for record in outcome.records if record["action"] == "edit"}
    assert ranks == {1, 4, 6}
    wanted = reference(base, aligned, outcome, tmp_path / "wanted")
    assert_adapter_is_the_edit(aligned, wanted, tmp_path / "out")


OTHERS = {
    # A dense layer beside experts: PEFT takes its gate_proj for a part of the fused experts unless told otherwise.
    "qwen3_moe": {**ARCHITECTURES["qwen3_moe"], "mlp_only_layers": [0]},
    # Experts stored transposed, with biases of two dimensions.
    "gpt_oss": {**ARCHITECTURES["mixtral"], "head_dim": 12, "layer_types": ["sliding_attention", "full_attention"]},
    # An embedding that shifts its positions.
    "opt": {
        "vocab_size": 128, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 80, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": False,
    },
    # An embedding that scales what it looks up.
    "gemma3_text": {**ARCHITECTURES["llama"], "head_dim": 12, "pad_token_id": 0},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OTHERS)
def test_modules_that_peft_has_no_exact_layer_for_are_exact_too(tmp_path, architecture, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, architecture, OTHERS[architecture])
    base, aligned = tiny_pair(tmp_path, architecture)
    outcome = write(base, aligned, tmp_path / "out")
    wanted = reference(base, aligned, outcome, tmp_path / "wanted")
    assert_adapter_is_the_edit(aligned, wanted, tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_parameters"]


def renamed(folder, target, change):
    """A copy of a checkpoint with other tensor names."""
    tensors = {change(name): tensor for name, tensor in read_tensors(folder).items()}
    return write_checkpoint(target, tensors, json.loads((folder / "config.json").read_text()))


def test_files_without_the_models_prefix_are_mapped_to_its_modules(tmp_path):
    pair = tiny_pair(tmp_path, "gpt2")
    base, aligned = (
        renamed(folder, tmp_path / "bare" / folder.name, lambda name: name.removeprefix("transformer."))
        for folder in pair
    )
    assert "h.0.attn.c_attn.weight" in read_tensors(aligned)
    outcome = write(base, aligned, tmp_path / "out")
    wanted = reference(base, aligned, outcome, tmp_path / "wanted")
    assert_adapter_is_the_edit(aligned, wanted, tmp_path / "out")


def test_the_parts_of_a_split_matrix_become_one_adapter_whose_ranks_add_up(tmp_path):
    base, aligned = tiny_pair(tmp_path, "gpt2")
    outcome = write(base, aligned, tmp_path / "out", split_fused=True)

    def thirds(name, delta):
        return delta.chunk(3, -1) if "c_attn.weight" in name else [delta]

    wanted = reference(base, aligned, outcome, tmp_path / "wanted", parts=thirds)
    assert_adapter_is_the_edit(aligned, wanted, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == 18
    assert config["rank_pattern"] == config["alpha_pattern"] == {"c_fc|c_proj": 6}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")
def test_a_head_beside_transposed_layers_is_exact_too(tmp_path):
    """GPT-2 with a head of its own: PEFT says that it treats the two kinds of layers differently, and does."""
    base, aligned = (
        untied(folder, tmp_path / "untied" / folder.name) for folder in tiny_pair(tmp_path, "gpt2")
    )
    outcome = write(base, aligned, tmp_path / "out")
    assert {"lm_head.weight", "transformer.wpe.weight"} <= {
        r["name"] for r in outcome.records if r["action"] == "edit"
    }
    wanted = reference(base, aligned, outcome, tmp_path / "wanted")
    assert_adapter_is_the_edit(aligned, wanted, tmp_path / "out")


def untied(folder, target):
    tensors, config = read_tensors(folder), json.loads((folder / "config.json").read_text())
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].flip(0).clone()
    return write_checkpoint(target, tensors, {**config, "tie_word_embeddings": False})


def test_matrices_that_are_not_selected_come_along_whole_on_the_base(tmp_path):
    base, aligned = tiny_pair(tmp_path)
    outcome = write(base, aligned, tmp_path / "out", anchor="base", exclude="o_proj", edit="linear")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert {"lm_head", "model.embed_tokens", "model.layers.1.self_attn.o_proj"} <= set(
        config["modules_to_save"]
    )
    reasons = {record["name"]: record["reason"] for record in outcome.records}
    assert reasons["lm_head.weight"].endswith("differs from base, carried whole")
    wanted = reference(base, aligned, outcome, tmp_path / "wanted", anchor="base")
    assert_adapter_is_the_edit(base, wanted, tmp_path / "out")


def test_rows_that_the_base_lacks_are_left_as_they_are(tmp_path):
    base, aligned = tiny_pair(tmp_path)
    tensors, config = read_tensors(base), json.loads((base / "config.json").read_text())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()
    shorter = write_checkpoint(tmp_path / "shorter", tensors, {**config, "vocab_size": 100})
    write(shorter, aligned, tmp_path / "out", vocab="common-rows")
    factors = load_file(tmp_path / "out/adapter_model.safetensors")
    rows = factors["base_model.model.model.embed_tokens.lora_embedding_A"]
    assert rows.shape == (6, 128)
    assert torch.count_nonzero(rows[:, 100:]) == 0
    assert torch.count_nonzero(rows[:, 99]) == 6  # control
    with pytest.raises(InputError, match="vocab_size = 128 in the aligned checkpoint and 100"):
        write(shorter, aligned, tmp_path / "other", vocab="common-rows", anchor="base")


# what is written


def test_the_config_names_its_anchor_and_pins_the_commit(tmp_path):
    base, aligned = tiny_pair(tmp_path)
    job = pipeline.prepare(
        LoX(rank=2), base=base, model=aligned, output=tmp_path / "out", options=Options(as_lora=True)
    )
    source = dataclasses.replace(job.sources["aligned"], repository="ORG/NAME", commit="c0ffee" * 6)
    pipeline.run(dataclasses.replace(job, sources={**job.sources, "aligned": source}))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("ORG/NAME", "c0ffee" * 6)
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["bias"]) == (2, 2, False, "none")
    assert (config["inference_mode"], config["task_type"]) == (True, "CAUSAL_LM")
    assert (config["rank_pattern"], config["modules_to_save"]) == ({}, None)
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert str(tmp_path) not in (tmp_path / "out/adapter_config.json").read_text()


def test_norms_travel_in_their_own_dtype_behind_the_wider_factors(tmp_path):
    base, aligned = tiny_pair(tmp_path)
    write(base, aligned, tmp_path / "out", anchor="base")
    checkpoint = read_tensors(aligned)
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    carried = {name: tensor for name, tensor in written.items() if ".lora_" not in name}
    assert len(carried) == 5
    for name, tensor in carried.items():
        assert torch.equal(tensor, checkpoint[name.removeprefix("base_model.model.")])
        assert tensor.dtype == torch.bfloat16


def test_records_say_the_same_as_those_of_a_model_and_that_nothing_was_lost(tmp_path):
    base, aligned = tiny_pair(tmp_path, "mixtral")
    outcome = write(base, aligned, tmp_path / "out", split_fused=True)
    model = surgery.apply(
        LoX(rank=6, alpha=ALPHA, split_fused=True), base=base, model=aligned, output=tmp_path / "model"
    )
    same = ("name", "action", "reason", "rank", "criterion", "certified_error", "energy_kept", "delta_norm")
    for mine, theirs in zip(outcome.records, model.records, strict=True):
        assert mine.keys() == theirs.keys()
        assert [mine.get(key) for key in same] == [theirs.get(key) for key in same]
        if mine["action"] == "edit":
            assert math.isclose(mine["edit_norm"], theirs["edit_norm"], rel_tol=1e-5)
            assert math.isclose(mine["edit_to_weight"], theirs["edit_to_weight"], rel_tol=1e-5)
            assert (mine["retention"], mine["noise"], mine["rounding"], mine["changed"]) == (
                1.0,
                0.0,
                "none",
                None,
            )
    assert outcome.totals["retention_min"] == 1.0
    assert outcome.totals["noise_to_edit"] == 0.0


def test_a_coefficient_of_zero_is_an_adapter_that_does_nothing(tmp_path):
    base, aligned = tiny_pair(tmp_path)
    write(base, aligned, tmp_path / "out", alpha=0.0)
    model = load(aligned)
    plain = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path / "out").eval()), plain)


def shas(folder):
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in (adapter.WEIGHTS, adapter.CONFIG, "surgery.json", "surgery.tensors.jsonl")
    }


def test_an_interrupted_run_is_finished_by_the_same_command(tmp_path, monkeypatch):
    base, aligned = tiny_pair(tmp_path)
    write(base, aligned, tmp_path / "whole/out")

    def stop(*_):
        raise Interrupted(2)

    with monkeypatch.context() as patched:
        patched.setattr(adapter, "write_file", stop)
        with pytest.raises(Interrupted):
            write(base, aligned, tmp_path / "out")
    assert partial_of(tmp_path / "out").is_dir()
    write(base, aligned, tmp_path / "out")
    assert shas(tmp_path / "out") == shas(tmp_path / "whole/out")
    write(base, aligned, tmp_path / "other", alpha=1.25)
    assert shas(tmp_path / "other") != shas(tmp_path / "whole/out")  # control


def test_progress_counts_the_shards(tmp_path):
    base, aligned = tiny_pair(tmp_path, shard_size="60KB")
    job = pipeline.prepare(
        LoX(), base=base, model=aligned, output=tmp_path / "out", options=Options(as_lora=True)
    )
    seen = []
    pipeline.run(job, lambda *call: seen.append(call))
    assert len(seen) > 1
    assert [number for _, number, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for *_, total in seen} == {len(seen)}
