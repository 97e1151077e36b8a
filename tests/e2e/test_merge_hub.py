"""`surgery merge ORG/MODEL ORG/ADAPTER` against a Hub on loopback."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.testing import write_checkpoint

pytestmark = pytest.mark.slow

NAMES = [f"model.layers.{layer}.mlp.up_proj" for layer in range(3)]


@pytest.fixture
def places(surgery_on_hub, tmp_path):
    """`org/model` in three shards and `org/adapter` on the Hub, and the folders they were made from."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(37, 23, generator=generator).bfloat16() for name in NAMES}
    config = {"model_type": "llama", "torch_dtype": "bfloat16"}
    model = write_checkpoint(tmp_path / "made" / "model", tensors, config, shards=3)
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    adapter = tmp_path / "made" / "adapter"
    adapter.mkdir()
    factors = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(2, 23, generator=generator) for name in NAMES
    }
    factors |= {
        f"base_model.model.{name}.lora_B.weight": torch.randn(37, 2, generator=generator) for name in NAMES
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "base_model_name_or_path": "org/model"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    surgery_on_hub.hub.create("org/model").commit_folder(model)
    surgery_on_hub.hub.create("org/adapter").commit_folder(adapter, {"training_args.bin": b"pickle"})
    return model, adapter


def weights(folder):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("*.safetensors"))
    }


def test_model_and_adapter_come_from_the_hub_pinned(surgery_on_hub, places, tmp_path):
    surgery.merge(*places, output=tmp_path / "local")
    for more in ((), ("--stream",)):
        done = surgery_on_hub(
            "merge", "org/model", "org/adapter", "-o", "out", "--overwrite", "--json", *more
        )
        assert done.returncode == 0, done.stderr
        assert weights(tmp_path / "out") == weights(tmp_path / "local")
    manifest = json.loads((tmp_path / "out" / "surgery.json").read_text())
    for role, name in (("model", "org/model"), ("adapter", "org/adapter")):
        commit = surgery_on_hub.hub.repositories[name].refs["main"]
        assert manifest["inputs"][role]["repository"] == name
        assert manifest["inputs"][role]["commit"] == commit
    assert manifest["roles"].endswith(
        "says that it belongs to org/model@" + manifest["inputs"]["model"]["commit"]
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "base_model: org/model" in card
    assert "adapter_model.safetensors" in surgery_on_hub.hub.fetched()
    assert "training_args.bin" not in surgery_on_hub.hub.fetched()
    # What was fetched is enough without the network.
    again = surgery_on_hub("merge", "org/model", "org/adapter", "-o", "off", "-q", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert weights(tmp_path / "off") == weights(tmp_path / "local")


def test_a_repository_without_an_adapter_in_safetensors_is_refused(surgery_on_hub, places):
    surgery_on_hub.hub.create("org/old").commit(
        {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"}
    )
    for name, words in (
        ("org/old", "is a pickle, which can hide code"),
        ("org/model", "has no adapter_config.json"),
    ):
        done = surgery_on_hub("merge", "org/model", name, "-o", "out")
        assert done.returncode == 3
        assert words in done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert "adapter_model.bin" not in surgery_on_hub.hub.fetched()
