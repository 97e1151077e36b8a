"""The plan and the manifest are read by other programs: their shape changes only on purpose."""

import json

import torch

import surgery
from surgery.testing import perturbed_copy, write_checkpoint

# What differs between machines and versions without anyone having meant it.
VOLATILE = {"disk_free", "seconds_estimate", "versions", "threads"}


def made_up_pair(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(40, 16, generator=generator),
        "model.layers.0.mlp.gate.weight": torch.randn(4, 16, generator=generator),
        "model.layers.0.mlp.experts.down_proj": torch.randn(4, 16, 24, generator=generator),
        "model.layers.0.input_layernorm.weight": torch.randn(16, generator=generator),
        "model.layers.0.self_attn.o_proj.weight": torch.randn(16, 16, generator=generator),
        "model.layers.1.self_attn.o_proj.weight": torch.randn(16, 16, generator=generator),
        "model.rotary.position_ids": torch.arange(8)[None],
    }
    config = {"model_type": "made-up", "num_experts": 4, "dtype": "bfloat16"}
    halves = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    base = write_checkpoint(tmp_path / "base", halves, config, shards=2)
    aligned = perturbed_copy(base, tmp_path / "aligned")
    (aligned / "README.md").write_text("---\nlicense: mit\nlanguage: en\nbase_model: org/base\n---\n")
    (aligned / "optimizer.pt").write_bytes(b"x")
    return base, aligned


def masked(document):
    return {key: "..." if key in VOLATILE else value for key, value in document.items()}


def test_the_plan_is_the_golden_one(tmp_path, golden):
    base, aligned = made_up_pair(tmp_path)
    job = surgery.prepare(
        surgery.LoX(rank=6, alpha=1.5, layers="0:1"), base=base, model=aligned, output=tmp_path / "out"
    )
    golden(masked(job.plan.document()), "plan.json")


def rounded(value):
    """Figures to two digits and no hashes: beyond that, processors differ."""
    if isinstance(value, str) and len(value) == 64:
        return "sha256"
    if isinstance(value, float):
        return float(f"{value:.1e}") if value > 1e-3 else "small"
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return value


def test_the_manifest_is_the_golden_one(tmp_path, golden):
    base, aligned = made_up_pair(tmp_path)
    surgery.apply(surgery.LoX(rank=3, alpha=1.5), base=base, model=aligned, output=tmp_path / "out")
    manifest = masked(json.loads((tmp_path / "out/surgery.json").read_text()))
    manifest["files"] = {
        name: entry["size"] for name, entry in manifest["files"].items() if "tensors" not in name
    }
    golden(rounded(manifest), "manifest.json")


def test_the_card_is_the_golden_one(tmp_path, golden):
    base, aligned = made_up_pair(tmp_path)
    method = surgery.LoX(rank=3, alpha=1.5, anchor="base", exclude="gate")
    surgery.apply(method, base=base, model=aligned, output=tmp_path / "out")
    golden((tmp_path / "out/README.md").read_text().splitlines(), "card.json")
