"""Adapters on mixtures of experts: one parameter in memory, one tensor for each expert in the files."""

import json
import re
import warnings

import adapters
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import InputError
from surgery.options import Options
from surgery.testing import read_tensors, tiny_model

WIDE = Options(dtype="float32")
TYPES = ["mixtral", "qwen2_moe", "qwen3_moe"]
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}


def saved(model, folder):
    """The tensors of a model as transformers saves them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return read_tensors(folder)


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "fused"])
@pytest.mark.parametrize("kind", TYPES)
def test_experts_in_memory_are_merged_into_the_files_as_they_are(tmp_path, kind, fused):
    model = tiny_model(tmp_path / "model", kind, fused=fused)
    adapter = adapters.make(model, tmp_path / "adapter", **EXPERTS)
    done = surgery.merge(model, adapter, output=tmp_path / "out", options=WIDE)
    found = read_tensors(tmp_path / "out")
    if fused:
        wanted = dict(adapters.merged(model, adapter).state_dict())
    else:
        wanted = saved(adapters.merged(model, adapter), tmp_path / "peft")
    assert found.keys() == wanted.keys()
    assert max(adapters.ulps(found[name], wanted[name]) for name in wanted) <= 2
    # Control: every expert of every layer is edited, and nothing but experts and queries.
    own = read_tensors(model)
    changed = {name for name in own if not torch.equal(own[name].float(), found[name])}
    assert changed == {name for name in own if re.search(r"\.experts\.|q_proj\.weight", name)}
    assert done.totals["edited"] == len(changed)


@pytest.mark.parametrize("kind", TYPES)
def test_logits_of_merged_experts_are_those_of_the_adapter(tmp_path, kind):
    model = tiny_model(tmp_path / "model", kind)
    adapter = adapters.make(model, tmp_path / "adapter", **EXPERTS)
    surgery.merge(model, adapter, output=tmp_path / "out", options=WIDE)
    reference = adapters.logits(adapters.loaded(model, adapter))
    assert torch.allclose(adapters.logits(adapters.load(tmp_path / "out")), reference, atol=1e-5)
    assert not torch.allclose(adapters.logits(adapters.load(model)), reference, atol=1e-3)  # control


@pytest.mark.parametrize("kind", TYPES)
def test_in_bfloat16_experts_keep_what_is_added(tmp_path, kind):
    model = tiny_model(tmp_path / "model", kind)
    adapter = adapters.make(model, tmp_path / "adapter", **{**EXPERTS, "r": 2})
    done = surgery.merge(model, adapter, output=tmp_path / "out")
    assert done.totals["retention_min"] > 0.98
    own, found = read_tensors(model), read_tensors(tmp_path / "out")
    for name, value in own.items():
        edited = re.search(r"\.experts\.|q_proj\.weight", name) is not None
        assert torch.equal(value, found[name]) != edited, name
    assert surgery.verify(tmp_path / "out", recompute=True).recomputed == "identical"


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("mixtral", ["w1", "w2", "w3"]), ("qwen2_moe", ["gate_proj", "up_proj", "down_proj"])],
)
def test_old_names_of_experts_mean_what_peft_takes_them_for(tmp_path, kind, targets):
    """PEFT turns these targets into parameters when it sets the adapter up, and saves it as that."""
    model = tiny_model(tmp_path / "model", kind)
    adapter = adapters.make(model, tmp_path / "adapter", target_modules=[*targets, "v_proj"])
    surgery.merge(model, adapter, output=tmp_path / "out", options=WIDE)
    found, wanted = read_tensors(tmp_path / "out"), saved(adapters.merged(model, adapter), tmp_path / "peft")
    assert max(adapters.ulps(found[name], wanted[name]) for name in wanted) <= 2


def expert_by_expert(model, folder, rank=3):
    """An adapter whose factors are named expert by expert, as before experts were one parameter; and its deltas."""
    own, generator = read_tensors(model), torch.Generator().manual_seed(4)
    tensors, deltas = {}, {}
    for name in (name for name in own if ".experts." in name):
        a = torch.randn(rank, own[name].shape[1], generator=generator) * 0.1
        b = torch.randn(own[name].shape[0], rank, generator=generator) * 0.1
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        deltas[name] = (b @ a) * 2.0
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    names = sorted({name.split(".")[-2] for name in deltas})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return deltas


@pytest.mark.parametrize("kind", TYPES)
def test_factors_named_expert_by_expert_land_on_each_experts_tensor(tmp_path, kind):
    model = tiny_model(tmp_path / "model", kind)
    deltas = expert_by_expert(model, tmp_path / "adapter")
    surgery.merge(model, tmp_path / "adapter", output=tmp_path / "out", options=WIDE)
    own, found = read_tensors(model), read_tensors(tmp_path / "out")
    for name, value in own.items():
        assert torch.equal(found[name], value.float() + deltas.get(name, 0.0)), name
    assert len(deltas) == 2 * 4 * 3


def test_what_cannot_be_taken_apart_is_refused_by_name(tmp_path):
    model = tiny_model(tmp_path / "model", "mixtral")
    expert_by_expert(model, tmp_path / "single")
    whole = tiny_model(tmp_path / "whole", "mixtral", fused=True)
    with pytest.raises(InputError, match=r"experts\.0\.w1\.lora_A.*lands nowhere"):
        surgery.merge(whole, tmp_path / "single", output=tmp_path / "out")
    adapter = adapters.make(model, tmp_path / "adapter", **EXPERTS)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    # One expert fewer, as of a model with three.
    cut = next(name for name in tensors if "experts" in name and "lora_A" in name)
    save_file({**tensors, cut: tensors[cut][:12]}, file)
    with pytest.raises(InputError, match=re.escape(cut)):
        surgery.merge(model, adapter, output=tmp_path / "out")
    # A checkpoint from which an expert's tensor is missing holds only a part of the parameter.
    save_file(tensors, file)
    own = load_file(model / "model.safetensors")
    gone = next(name for name in own if "experts.3.w1" in name)
    save_file({name: value for name, value in own.items() if name != gone}, model / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(InputError, match=r"experts.*of which the files of model hold"):
        surgery.merge(model, adapter, output=tmp_path / "out")
