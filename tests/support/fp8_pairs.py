"""Pairs of checkpoints whose weights are stored in block-scaled fp8."""

import json

import pytest
import torch

import surgery
from surgery.checkpoint.fp8 import quantise
from surgery.checkpoint.layout import open_checkpoint
from surgery.checkpoint.quantised import Scaling, scalings
from surgery.testing import read_tensors, write_checkpoint

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


def hashes(output):
    return {
        name: entry["sha256"]
        for name, entry in json.loads((output / "surgery.json").read_text())["files"].items()
    }
