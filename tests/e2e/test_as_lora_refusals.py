"""`--as-lora`: what no adapter can hold is refused by name, and what one takes is told beforehand."""

import json

import pytest
import torch
from as_lora import write
from safetensors.torch import load_file, save_file

from surgery import adapter, pipeline
from surgery.checkpoint.staging import partial_of
from surgery.errors import InputError, UsageError
from surgery.methods.lox import LoX
from surgery.options import Options
from surgery.plan import plan_steps
from surgery.testing import tiny_pair

pytestmark = [
    # PEFT 0.21 reads an attribute that transformers 5.23 renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def refused(kind, match, tmp_path, base, aligned, **settings):
    with pytest.raises(kind, match=match) as caught:
        write(base, aligned, tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not partial_of(tmp_path / "out").exists()


def test_full_rank_is_refused(tmp_path):
    refused(UsageError, "rank is full", tmp_path, *tiny_pair(tmp_path), rank="full")


def test_a_bias_that_differs_in_an_edited_module_is_refused_on_the_base(tmp_path):
    base, aligned = tiny_pair(tmp_path, "gpt2")
    refused(
        InputError, r"transformer\.h\.0\.attn\.c_attn\.bias differs", tmp_path, base, aligned, anchor="base"
    )


def test_experts_that_are_not_selected_are_refused_on_the_base(tmp_path):
    base, aligned = tiny_pair(tmp_path, "mixtral")
    match = r"experts\.\d\.w\d\.weight differs from base and is a part of"
    refused(InputError, match, tmp_path, base, aligned, anchor="base", exclude="experts")


def test_a_config_that_gives_other_logits_is_refused_on_the_base(tmp_path):
    base, aligned = tiny_pair(tmp_path)
    config = json.loads((aligned / "config.json").read_text())
    (aligned / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3, "eos_token_id": 7}))
    refused(InputError, r"rms_norm_eps = 0\.001 in the aligned", tmp_path, base, aligned, anchor="base")
    (aligned / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    write(base, aligned, tmp_path / "out", anchor="base")  # control


def extended(folder):
    """A checkpoint with a tensor that no model class has."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(len(str(folder)))
    tensors["mtp.proj.weight"] = torch.randn(20, 30, generator=generator).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_edited_tensor_that_the_model_class_lacks_is_refused_by_name(tmp_path):
    base, aligned = tiny_pair(tmp_path)
    extended(base)
    extended(aligned)
    refused(InputError, r"mtp\.proj\.weight is edited, but the model class has no", tmp_path, base, aligned)
    outcome = write(base, aligned, tmp_path / "out", exclude="^mtp", anchor="base")
    assert "mtp.proj.weight" not in str(load_file(tmp_path / "out/adapter_model.safetensors").keys())
    assert {record["name"]: record["action"] for record in outcome.records}["mtp.proj.weight"] == "copy"


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "nobody_knows"},
        {
            "model_type": "secret",
            "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        },
    ],
    ids=["unknown", "remote code"],
)
def test_an_architecture_that_transformers_does_not_have_is_refused_by_name(tmp_path, change):
    base, aligned = tiny_pair(tmp_path)
    config = json.loads((aligned / "config.json").read_text())
    (aligned / "config.json").write_text(json.dumps({**config, **change}))
    (aligned / "code.py").write_text("raise SystemExit('code from a model folder ran')")
    refused(InputError, rf"aligned \({change['model_type']}\) cannot be built", tmp_path, base, aligned)


def test_an_edit_of_a_tied_embedding_is_refused_where_it_was_not_left_out(tmp_path):
    base, aligned = tiny_pair(tmp_path, "llama-tied")
    job = pipeline.prepare(
        LoX(edit="linear"), base=base, model=aligned, output=tmp_path / "out", options=Options(as_lora=True)
    )
    steps = plan_steps(LoX(), job.aligned, job.base, dtype="keep")[0]
    with pytest.raises(InputError, match=r"embed_tokens\.weight shares its memory"):
        adapter.refuse_unplaceable(LoX(), job.aligned, job.base, steps)
    adapter.refuse_unplaceable(job.method, job.aligned, job.base, job.plan.steps)  # control


def test_the_size_told_beforehand_is_what_the_tensors_take(tmp_path):
    base, aligned = tiny_pair(tmp_path, "mixtral", fused=True)
    job = pipeline.prepare(
        LoX(), base=base, model=aligned, output=tmp_path / "out", options=Options(as_lora=True)
    )
    pipeline.run(job)
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    edits = {step.name: step for step in job.plan.edits}
    # The router's rank is raised from 4 to that of the other matrices.
    padding = sum(4 * 2 * sum(step.shape) for name, step in edits.items() if name.endswith("gate.weight"))
    found = sum(tensor.nbytes for tensor in written.values())
    assert found == adapter.adapter_size(LoX(), job.plan.steps) + padding


def test_the_plan_says_that_tied_embeddings_are_left_out(tmp_path):
    base, aligned = tiny_pair(tmp_path, "llama-tied")
    options = Options(as_lora=True)
    job = pipeline.prepare(LoX(), base=base, model=aligned, output=tmp_path / "out", options=options)
    assert any("ties its embeddings" in note for note in job.plan.notes)
    assert job.plan.steps["model.embed_tokens.weight"].action == "copy"
    assert job.plan.bytes_written == adapter.adapter_size(LoX(), job.plan.steps)
    whole = pipeline.prepare(LoX(), base=base, model=aligned, output=tmp_path / "out")
    assert whole.plan.steps["model.embed_tokens.weight"].action == "edit"  # control
