from pathlib import Path

import pytest

from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.layout import Checkpoint
from surgery.checkpoint.quantised import Scaling, refuse_quantised, scalings
from surgery.errors import InputError

PLAIN = {
    "model.embed_tokens.weight": ("BF16", (7, 3)),
    "model.layers.0.self_attn.q_proj.weight": ("F32", (3, 3)),
    "model.layers.0.norm.weight": ("F16", (3,)),
    "lm_head.weight": ("F64", (7, 3)),
}


def checkpoint(config=None, **extra):
    named = {name.replace("__", "."): value for name, value in extra.items()}
    return opened({**PLAIN, **named}, config)


def opened(tensors, config=None):
    infos = {name: TensorInfo(name, dtype, shape, "f", 0, 0) for name, (dtype, shape) in tensors.items()}
    return Checkpoint(Path("x"), "aligned", (), infos, config or {}, None, ())


BUFFERS = {
    "embeddings.position_ids": ("I64", (1, 512)),
    "embeddings.token_type_ids": ("I64", (1, 512)),
    "h.0.attn.bias": ("U8", (1, 1, 9, 9)),
    "h.1.attn.bias": ("BOOL", (1, 1, 9, 9)),
    "h.0.attn.masked_bias": ("F32", ()),
    "layers.0.rotary_emb.inv_freq": ("F32", (4,)),
    "encoder.layer.0.relative_position_index": ("I64", (9, 9)),
    "encoder.layer.1.relative_position_index": ("I32", (9, 9)),
    "bn.num_batches_tracked": ("I64", ()),
    "mlp.gate.tid2eid": ("I32", (9, 2)),
    "causal_mask": ("I8", (9, 9)),
    "steps": ("I32", (1,)),
    "freqs_cis": ("C64", (9, 2)),
}


def test_plain_floats_pass():
    refuse_quantised(checkpoint())


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_no_weights(name):
    refuse_quantised(opened({**PLAIN, name: BUFFERS[name]}))


Q = "model.layers.0.mlp.up_proj"
STORED = {
    "bitsandbytes 4-bit": (
        {f"{Q}.weight": ("U8", (9, 1)), f"{Q}.weight.quant_state.bitsandbytes__nf4": ("U8", (80,))},
        "dequantize",
    ),
    "bitsandbytes 8-bit": ({f"{Q}.weight": ("I8", (3, 3)), f"{Q}.SCB": ("F32", (3,))}, "dequantize"),
    "GPTQ": ({f"{Q}.g_idx": ("I32", (9,)), f"{Q}.qweight": ("I32", (3, 3))}, "16-bit checkpoint"),
    "GPTQ or AWQ": ({f"{Q}.qweight": ("I32", (3, 3)), f"{Q}.qzeros": ("I32", (3, 3))}, "16-bit checkpoint"),
    "block-scaled fp8": (
        {f"{Q}.weight": ("F8_E4M3", (3, 3)), f"{Q}.weight_scale_inv": ("F32", (1, 1))},
        "FineGrainedFP8Config",
    ),
    "fp8": ({f"{Q}.weight": ("F8_E5M2", (3, 3))}, "FineGrainedFP8Config"),
    "mxfp4": (
        {
            "mlp.experts.gate_up_proj_scales": ("U8", (2, 3)),
            "mlp.experts.gate_up_proj_blocks": ("U8", (2, 3, 4)),
        },
        "Mxfp4Config",
    ),
    "BitNet (1-bit)": (
        {f"{Q}.weight": ("U8", (3, 3)), f"{Q}.weight_scale": ("BF16", (1,))},
        "16-bit checkpoint",
    ),
    "compressed-tensors": ({f"{Q}.weight_packed": ("I32", (3, 3))}, "16-bit checkpoint"),
    "nvfp4": ({f"{Q}.weight": ("U8", (3, 3)), f"{Q}.weight_scale_2": ("F32", ())}, "16-bit checkpoint"),
    "HQQ": ({f"{Q}.W_q": ("U8", (3, 3))}, "16-bit checkpoint"),
    "vector-quantised": ({f"{Q}.codebooks": ("F16", (3, 3))}, "16-bit checkpoint"),
    "quantised (F4)": ({f"{Q}.weight": ("F4", (3, 4))}, "16-bit checkpoint"),
    "quantised (F8_E8M0)": ({f"{Q}.scales": ("F8_E8M0", (3, 4))}, "16-bit checkpoint"),
    "integer": ({f"{Q}.weight": ("I8", (3, 3))}, "16-bit checkpoint"),
}


@pytest.mark.parametrize("found", STORED)
def test_quantised_weights_are_named_by_their_tensors(found):
    tensors, way_out = STORED[found]
    with pytest.raises(InputError) as caught:
        refuse_quantised(opened({**PLAIN, **tensors}))
    message = str(caught.value)
    assert f"aligned has {found} weights" in message
    assert any(name in message for name in tensors)
    assert way_out in message


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("x.packed", ("I32", (3, 3))), ("x.qdata", ("U8", (3, 3))), ("x.weight", ("I64", (3,)))],
)
def test_integers_of_an_unknown_scheme_are_refused(name, tensor):
    with pytest.raises(InputError, match=f"integer weights .tensor {name}"):
        refuse_quantised(opened({**PLAIN, name: tensor}))


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
        ({"quantization_config": {"quant_method": "bitnet"}}, r"BitNet \(1-bit\)"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes 4-bit",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "bitsandbytes 8-bit",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
        ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
        ({"quantization_config": {}}, "quantised"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "GPTQ"),
    ],
)
def test_quantisation_stated_by_the_config_is_refused(config, found):
    with pytest.raises(InputError, match=rf"aligned has {found}.* weights \(config.json\)"):
        refuse_quantised(checkpoint(config))


def test_the_config_names_the_format_and_the_tensor_comes_with_it():
    tensors, _ = STORED["GPTQ or AWQ"]
    with pytest.raises(InputError, match=rf"AWQ weights \(tensor {Q}.qweight, I32\)"):
        refuse_quantised(opened({**PLAIN, **tensors}, {"quantization_config": {"quant_method": "awq"}}))


@pytest.mark.parametrize(
    "config",
    [{"quantization_config": None}, {"text_config": {"model_type": "llama"}}, {"architectures": ["A"]}],
)
def test_a_config_without_quantisation_passes(config):
    refuse_quantised(checkpoint(config))


E = "model.layers.0.mlp.experts.gate_up_proj"
FP8 = {
    f"{Q}.weight": ("F8_E4M3", (200, 300)),
    f"{Q}.weight_scale_inv": ("F32", (2, 3)),
    E: ("F8_E4M3", (4, 256, 130)),
    f"{E}_scale_inv": ("BF16", (4, 2, 2)),
}


def settings(block=(128, 128), **more):
    return {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": list(block),
            **more,
        }
    }


@pytest.mark.parametrize("config", [settings(), {"text_config": settings()}], ids=["top", "nested"])
def test_block_scaled_fp8_is_described_and_passes(config):
    found = opened({**PLAIN, **FP8}, config)
    refuse_quantised(found)
    block = (128, 128)
    assert scalings(found) == {
        f"{Q}.weight": Scaling(f"{Q}.weight_scale_inv", block),
        E: Scaling(f"{E}_scale_inv", block),
    }


def test_the_block_size_and_the_kind_of_scale_come_from_the_config():
    tensors = {**FP8, f"{Q}.weight_scale_inv": ("F32", (4, 2)), f"{E}_scale_inv": ("F32", (4, 4, 1))}
    found = scalings(opened(tensors, settings((64, 256), scale_fmt="ue8m0")))
    assert found[f"{Q}.weight"] == Scaling(f"{Q}.weight_scale_inv", (64, 256), True)


@pytest.mark.parametrize(
    ("change", "config", "named"),
    [
        ({}, {}, "block-scaled fp8"),
        ({}, settings(weight_block_size=None), "weight_scale_inv"),
        ({}, settings((0, 128)), "weight_scale_inv"),
        ({}, settings(fmt="e5m2"), "weight_scale_inv"),
        ({f"{Q}.weight_scale_inv": None}, settings(), f"{Q}.weight, F8_E4M3"),
        (
            {f"{Q}.weight_scale_inv": None, f"{Q}.weight_scale": ("F32", ())},
            settings(),
            f"{Q}.weight, F8_E4M3",
        ),
        ({f"{Q}.weight_scale_inv": ("F8_E8M0", (2, 3))}, settings(), f"{Q}.weight_scale_inv"),
        ({f"{Q}.weight": ("F8_E5M2", (200, 300))}, settings(), f"{Q}.weight"),
        ({"x.qweight": ("I32", (3, 3))}, settings(), "x.qweight"),
        ({name: None for name in FP8}, settings(), "config.json"),
    ],
)
def test_fp8_that_is_not_all_block_scaled_is_refused(change, config, named):
    tensors = {name: value for name, value in {**PLAIN, **FP8, **change}.items() if value is not None}
    with pytest.raises(InputError, match="fp8") as caught:
        refuse_quantised(opened(tensors, config))
    assert named in str(caught.value)
    assert "FineGrainedFP8Config" in str(caught.value)


def test_scales_of_another_shape_are_refused_by_name():
    tensors = {**FP8, f"{Q}.weight_scale_inv": ("F32", (3, 2))}
    with pytest.raises(InputError, match=rf"{Q}\.weight_scale_inv.*\[3, 2\].*weight_block_size"):
        refuse_quantised(opened(tensors, settings()))
