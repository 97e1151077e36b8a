"""`surgery merge`: adapters folded into files, against PEFT's own merge."""

import hashlib
import json
import math
import shutil
import subprocess
import sys
import warnings

import adapters
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import InputError, UsageError
from surgery.options import Options
from surgery.testing import read_tensors, tiny_model

WIDE = Options(dtype="float32")

# What an adapter may ask for, by name.
KINDS = {
    "plain": {},
    "all linear": {"target_modules": "all-linear", "r": 3},
    "rslora": {"use_rslora": True, "r": 5},
    "rank and alpha patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "^model.layers.1.*down_proj": 7},
        "alpha_pattern": {"down_proj": 3},
    },
    "dora": {"use_dora": True},
    "modules to save": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding dora": {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    "some layers": {"layers_to_transform": [1]},
    "a pattern": {"target_modules": r".*\.0\..*(up|gate)_proj"},
}


def tensors_of(model):
    """The tensors of a model as its files would hold them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama") / "model", shard_size="40KB")


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_a_merge_is_pefts(llama, tmp_path, kind):
    adapter = adapters.make(llama, tmp_path / "adapter", **KINDS[kind])
    done = surgery.merge(llama, adapter, output=tmp_path / "out", options=WIDE)
    wanted, found = tensors_of(adapters.merged(llama, adapter)), read_tensors(tmp_path / "out")
    assert found.keys() == wanted.keys()
    worst = max(adapters.ulps(found[name], wanted[name]) for name in wanted)
    assert worst <= (2 if "dora" in kind else 0), worst
    # Control: the edited tensors are not the model's own.
    own = read_tensors(llama)
    changed = {name for name in own if not torch.equal(own[name].float(), found[name])}
    assert changed == {record["name"] for record in done.records if record["action"] == "edit"}
    assert len(changed) == done.totals["edited"] > 1


def test_conv1d_layers_are_merged_the_other_way_round(tmp_path):
    model = tiny_model(tmp_path / "model", "gpt2")
    # c_proj of the attention is square: only the model class says which way its weight lies.
    for number, targets in enumerate((["c_attn", "c_fc"], ["attn.c_proj"], ["c_proj", "lm_head"])):
        adapter = adapters.make(model, tmp_path / f"adapter{number}", target_modules=targets)
        if "lm_head" in targets:
            with pytest.raises(InputError, match=r"lm_head.*lands nowhere"):
                surgery.merge(model, adapter, output=tmp_path / f"out{number}", options=WIDE)
            continue
        surgery.merge(model, adapter, output=tmp_path / f"out{number}", options=WIDE)
        wanted, found = adapters.merged(model, adapter).state_dict(), read_tensors(tmp_path / f"out{number}")
        for name, value in found.items():
            full = name if name in wanted else f"transformer.{name}"
            assert torch.equal(value, wanted[full]), name


def test_a_bias_of_b_goes_to_the_bias(tmp_path):
    model = tiny_model(tmp_path / "model", "gpt2")
    adapter = adapters.make(model, tmp_path / "adapter", target_modules=["c_fc"], lora_bias=True)
    done = surgery.merge(model, adapter, output=tmp_path / "out", options=WIDE)
    wanted, found = adapters.merged(model, adapter).state_dict(), read_tensors(tmp_path / "out")
    biases = [
        record["name"] for record in done.records if record["action"] == "edit" and "bias" in record["name"]
    ]
    assert len(biases) == 2
    for name in biases:
        assert adapters.ulps(found[name], wanted[name]) <= 1


def test_several_adapters_add_up_each_times_its_weight(llama, tmp_path):
    one = adapters.make(llama, tmp_path / "one", r=4)
    two = adapters.make(llama, tmp_path / "two", seed=2, r=2, target_modules=["q_proj", "v_proj"])
    surgery.merge(llama, [one, two], output=tmp_path / "out", options=WIDE)
    wanted, found = tensors_of(adapters.merged(llama, one, two)), read_tensors(tmp_path / "out")
    assert max(adapters.ulps(found[name], wanted[name]) for name in wanted) <= 2
    weighted = surgery.merge(
        llama, [one, two], weights=[0.5, -2.0], output=tmp_path / "weighted", options=WIDE
    )
    assert weighted.plan.equation == "W' = W + 0.5 s_1 B_1 A_1 + -2 s_2 B_2 A_2"
    own, other = read_tensors(llama), read_tensors(tmp_path / "weighted")
    name = "model.layers.1.self_attn.q_proj.weight"
    parts = [
        read_tensors(surgery.merge(llama, each, output=tmp_path / f"{each.name}-out", options=WIDE).output)[
            name
        ]
        for each in (one, two)
    ]
    base = own[name].double()
    expected = base + 0.5 * (parts[0] - base) - 2 * (parts[1] - base)
    assert torch.allclose(other[name].double(), expected, atol=1e-6)
    assert not torch.allclose(other[name].double(), found[name].double(), atol=1e-3)  # control


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_16_bits_are_multiplied_in_float32(llama, tmp_path, dtype):
    adapter = adapters.make(llama, tmp_path / "adapter", dtype=dtype)
    assert {value.dtype for value in load_file(adapter / "adapter_model.safetensors").values()} == {dtype}
    surgery.merge(llama, adapter, output=tmp_path / "out", options=WIDE)
    wanted, found = tensors_of(adapters.merged(llama, adapter)), read_tensors(tmp_path / "out")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_in_bfloat16_what_is_not_a_target_is_byte_for_byte_and_retention_is_told(llama, tmp_path):
    adapter = adapters.make(llama, tmp_path / "adapter", std=0.05)
    done = surgery.merge(llama, adapter, output=tmp_path / "out")
    own, found = read_tensors(llama), read_tensors(tmp_path / "out")
    targets = {name for name in own if "q_proj" in name or "down_proj" in name}
    for name, value in own.items():
        same = torch.equal(value.view(torch.int16), found[name].view(torch.int16))
        assert same == (name not in targets), name
    assert {record["name"] for record in done.records if record["action"] == "edit"} == targets
    assert 0.99 <= done.totals["retention_min"] <= done.totals["retention"] <= 1.01
    # The logits are those of the adapter on the same model, as near as rounding lets them be.
    reference = adapters.logits(adapters.loaded(llama, adapter))
    merged = adapters.logits(adapters.load(tmp_path / "out"))
    plain = adapters.logits(adapters.load(llama))
    assert (merged - reference).norm() < 0.05 * (plain - reference).norm()


def test_a_delta_too_small_for_bfloat16_is_kept_along_its_directions(llama, tmp_path):
    adapter = adapters.make(llama, tmp_path / "adapter", std=0.0002)
    nearest = surgery.merge(llama, adapter, output=tmp_path / "n", options=Options(rounding="nearest"))
    chosen = surgery.merge(llama, adapter, output=tmp_path / "a")
    assert nearest.totals["retention_min"] < 0.9  # control: rounding to nearest loses it
    assert chosen.totals["retention_min"] > 0.98
    assert {record["rounding"] for record in chosen.records if record["action"] == "edit"} >= {"compensated"}


def test_logits_of_the_merged_folder_are_those_of_the_adapter(llama, tmp_path):
    adapter = adapters.make(llama, tmp_path / "adapter", use_dora=True, modules_to_save=["lm_head"])
    surgery.merge(llama, adapter, output=tmp_path / "out", options=WIDE)
    reference = adapters.logits(adapters.loaded(llama, adapter))
    assert torch.allclose(adapters.logits(adapters.load(tmp_path / "out")), reference, atol=2e-5)
    assert not torch.allclose(adapters.logits(adapters.load(llama)), reference, atol=1e-2)  # control


def test_dense_deltas_are_added_under_the_names_of_the_files(llama, tmp_path):
    own, folder = read_tensors(llama), tmp_path / "deltas"
    folder.mkdir()
    names = ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    deltas = {name: torch.randn(own[name].shape) * 0.1 for name in names}
    save_file({names[0]: deltas[names[0]]}, folder / "delta-1.safetensors")
    save_file({name: deltas[name] for name in names[1:]}, folder / "delta-2.safetensors")
    done = surgery.merge(llama, folder, output=tmp_path / "out", options=WIDE)
    found = read_tensors(tmp_path / "out")
    for name, value in own.items():
        assert torch.equal(found[name], value.float() + deltas.get(name, torch.zeros(()))), name
    assert done.totals["edited"] == 3
    assert surgery.merge(llama, folder, output=tmp_path / "16").totals["retention_min"] > 0.99
    assert surgery.verify(tmp_path / "16", recompute=True).recomputed == "identical"
    save_file({"model.nowhere.weight": torch.ones(2)}, folder / "delta-3.safetensors")
    with pytest.raises(InputError, match=r"model\.nowhere\.weight of deltas lands nowhere"):
        surgery.merge(llama, folder, output=tmp_path / "no")


def test_an_edit_as_an_adapter_and_merged_again_is_the_edit(tmp_path):
    method, pair = surgery.LoX(rank=3, edit="linear"), {"base": "demo:base", "model": "demo:aligned"}
    surgery.apply(method, **pair, output=tmp_path / "lox", options=WIDE)
    surgery.apply(method, **pair, output=tmp_path / "adapter", options=Options(as_lora=True))
    surgery.merge("demo:aligned", tmp_path / "adapter", output=tmp_path / "merged", options=WIDE)
    edited, merged = read_tensors(tmp_path / "lox"), read_tensors(tmp_path / "merged")
    assert max(float((edited[name] - merged[name]).abs().max()) for name in edited) < 1e-6
    own = read_tensors(surgery.prepare(method, **pair, output=tmp_path / "x").sources["aligned"].folder)
    assert any(not torch.equal(own[name].float(), merged[name]) for name in own)  # control


def test_a_zero_delta_is_no_edit_and_nothing_but_zeros_is_refused(llama, tmp_path):
    adapter = adapters.make(llama, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "layers.0" in name and "lora_B" in name:
            tensors[name].zero_()
    save_file(tensors, file)
    done = surgery.merge(llama, adapter, output=tmp_path / "out")
    assert (done.totals["edited"], done.totals["unchanged"]) == (2, 2)
    assert surgery.verify(tmp_path / "out", recompute=True).recomputed == "identical"
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, file)
    with pytest.raises(InputError, match="every delta is zero"):
        surgery.merge(llama, adapter, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "none.partial").exists()


def test_manifest_and_card_name_model_adapter_and_training(llama, tmp_path):
    adapter = adapters.make(llama, tmp_path / "adapter")
    trained = {
        "method": "vaccine",
        "title": "Vaccine",
        "paper": "https://arxiv.org/abs/2402.01109",
        "equation": "min L(e + eps)",
        "hyperparameters": {"rho": 2.0},
        "data": {"aligned": {"source": "demo:aligned", "rows": 12, "sha256": "ab"}},
        "seed": 3,
    }
    plain = surgery.merge(llama, adapter, output=tmp_path / "plain")
    whole = surgery.merge(llama, adapter, output=tmp_path / "trained", trained=trained)
    manifest = json.loads(whole.manifest.read_text())
    assert manifest["method"] == "vaccine"
    assert manifest["trained"] == trained
    assert set(manifest["inputs"]) == {"model", "adapter"}
    card = (tmp_path / "trained" / "README.md").read_text()
    assert "trained by Vaccine" in card
    assert "| rho | 2.0 |" in card
    assert "base_model: model\nbase_model_relation: finetune" in card
    assert "immunised" not in card
    other = (tmp_path / "plain" / "README.md").read_text()
    assert "merged with adapter" in other
    assert "surgery merge model adapter" in other
    assert json.loads(plain.manifest.read_text())["method"] == "merge"
    # The weights are the same: training is only told.
    for name, entry in manifest["files"].items():
        if name.startswith("model"):
            assert json.loads(plain.manifest.read_text())["files"][name] == entry


def test_an_output_is_verified_and_a_changed_adapter_found(llama, tmp_path):
    adapter = adapters.make(llama, tmp_path / "adapter")
    surgery.merge(llama, adapter, output=tmp_path / "out")
    found = surgery.verify(tmp_path / "out", recompute=True, strict=True)
    assert (found.recomputed, found.notes) == ("identical", ())
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 7}))
    with pytest.raises(InputError, match=r"adapter_config\.json is not the file"):
        surgery.verify(tmp_path / "out", recompute=True)
    shutil.rmtree(adapter)
    left = surgery.verify(tmp_path / "out")
    assert left.copied == found.copied
    assert "cannot be repeated" in left.notes[0]
    with pytest.raises(InputError, match="there is no folder"):
        surgery.verify(tmp_path / "out", recompute=True)
    file = next((tmp_path / "out").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(surgery.SurgeryError, match="not the file the manifest describes"):
        surgery.verify(tmp_path / "out")


def test_a_plan_reads_no_tensor_and_says_what_lands_where(llama, tmp_path):
    from surgery.merging import prepare

    adapter = adapters.make(llama, tmp_path / "adapter", modules_to_save=["lm_head"])
    for file in adapter.glob("*.safetensors"):
        raw = file.read_bytes()
        header = 8 + int.from_bytes(raw[:8], "little")
        file.write_bytes(raw[:header] + b"\xff" * (len(raw) - header))  # NaN throughout
    plan = prepare(llama, adapter, output=tmp_path / "out").plan
    reasons = {step.name: step.reason for step in plan.edits}
    assert reasons["lm_head.weight"] == "replaced by adapter"
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == "LoRA of rank 4 in adapter"
    assert plan.steps["model.layers.0.self_attn.q_proj.weight"].rank == 4
    assert plan.roles.summary() == "adapter says that it belongs to model"
    with pytest.raises(InputError, match="holds NaN or infinity"):
        surgery.merge(llama, adapter, output=tmp_path / "out")


def test_weights_and_options_that_mean_nothing_are_refused(llama, tmp_path):
    one = adapters.make(llama, tmp_path / "one", modules_to_save=["lm_head"])
    with pytest.raises(InputError, match=r"lm_head.* replaces a tensor"):
        surgery.merge(llama, one, weights=[0.5], output=tmp_path / "out")
    with pytest.raises(UsageError, match="2 --weight and 1 adapters"):
        surgery.merge(llama, one, weights=[0.5, 1.0], output=tmp_path / "out")
    with pytest.raises(UsageError, match="finite number other than 0"):
        surgery.merge(llama, one, weights=[math.nan], output=tmp_path / "out")
    with pytest.raises(UsageError, match="leave out --as-lora"):
        surgery.merge(llama, one, output=tmp_path / "out", options=Options(as_lora=True))
    with pytest.raises(InputError, match="is replaced by one and changed by two as well"):
        two = adapters.make(llama, tmp_path / "two", target_modules=["lm_head"])
        surgery.merge(llama, [one, two], output=tmp_path / "out")
    with pytest.raises(UsageError, match="share a folder"):
        surgery.merge(llama, one, output=one / "out")


KILLED = """
import os, signal, sys
import surgery
def progress(shard, done, total):
    if done == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
surgery.merge(sys.argv[1], sys.argv[2], output=sys.argv[3], progress=progress)
"""


def written(folder):
    """SHA-256 of what an output holds, the account of the run apart."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.name != "surgery.run.json"
    }


def test_killed_and_resumed_it_comes_to_the_same_bytes(llama, tmp_path):
    adapter, out, partial = (
        adapters.make(llama, tmp_path / "adapter"),
        tmp_path / "out",
        tmp_path / "out.partial",
    )
    whole = surgery.merge(llama, adapter, output=tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(llama), str(adapter), str(out), "2"]
    assert subprocess.run(command, check=False, timeout=120).returncode == -9
    assert not out.exists()
    done = sorted(partial.glob("model-*.safetensors"))
    before = {file.name: file.stat().st_mtime_ns for file in done}
    assert len(before) == 2 < len(list(llama.glob("model-*.safetensors")))
    # Another merge does not take up what this one left.
    with pytest.raises(UsageError, match="left from another run"):
        surgery.merge(llama, adapter, weights=[2.0], output=out)
    resumed = surgery.merge(llama, adapter, output=out)
    assert written(out) == written(tmp_path / "whole")
    assert resumed.totals == whole.totals
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_a_config_that_changes_under_an_interrupted_merge_is_noticed(llama, tmp_path):
    adapter, out = adapters.make(llama, tmp_path / "adapter"), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(llama), str(adapter), str(out), "1"]
    assert subprocess.run(command, check=False, timeout=120).returncode == -9
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 60}))
    with pytest.raises(UsageError, match="left from another run"):
        surgery.merge(llama, adapter, output=out)
