"""Tiny models with an adapter, and batches of random tokens, for the tests of trained methods."""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from surgery.train import blocks
from surgery.train.step import Batch, Step

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
ENDS = {"bos_token_id": 0, "eos_token_id": 1}
ARCHITECTURES = {
    "llama": COMMON,
    "qwen2": COMMON,
    "qwen3": {**COMMON, "head_dim": 8},
    "gemma2": {**COMMON, "head_dim": 8},
    "gemma3_text": {**COMMON, "head_dim": 8},
    "mistral": COMMON,
    "gpt2": {**GPT2, **ENDS},
    "opt": {**COMMON, "ffn_dim": 56, "word_embed_proj_dim": 32},
    "gpt_neox": {name: value for name, value in COMMON.items() if name != "num_key_value_heads"},
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "max_position_embeddings": 64,
        "window_size": 8,
        **ENDS,
    },
    "mixtral": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**COMMON, **MOE, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**COMMON, **MOE, "head_dim": 8},
}


def model_of(architecture="llama", *, seed=0, dtype=torch.float32, **changes):
    """A random model of four blocks in training mode, its own dropout off."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if architecture == "gpt2" else {}
    if architecture in ("opt", "gpt_neo"):
        off = {"dropout": 0.0, "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **off, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).to(dtype).train()


def adapted(architecture="llama", *, layers=None, rank=4, dropout=0.0, spread=0.1, seed=0, **options):
    """Such a model with LoRA on the linear modules of its blocks, whose B is normal noise of size `spread`."""
    model = model_of(architecture, seed=seed, **options)
    depth = len(blocks.find(model).layers)
    names = blocks.linear_names(model, layers if layers is not None else range(depth))
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks for an attribute that transformers renamed, and corrects the layout of GPT-2's weights.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed + 1)
        model = get_peft_model(model, config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=spread) if spread else torch.nn.init.zeros_(weight)
    return model.train()


def batch(seed, *, rows=3, length=13, padding=(4, 0, 2), prompt=5):
    """Random rows, the first ones padded on the right; the tokens after `prompt` are the answer."""
    tokens = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    attended = torch.ones(rows, length, dtype=torch.bool)
    for row, count in enumerate(padding[:rows]):
        attended[row, length - count :] = False
    answered = attended.clone()
    answered[:, :prompt] = False
    return Batch(tokens.where(attended, torch.zeros_like(tokens)), attended, answered)


def split(whole, *sizes):
    """Its rows as micro-batches of these sizes."""
    parts = zip(
        *(getattr(whole, name).split(sizes) for name in ("tokens", "attended", "answered")), strict=True
    )
    return [Batch(*part) for part in parts]


def widened(whole, columns, filler=7):
    """The same rows with more padding, of another token."""
    tokens = torch.nn.functional.pad(whole.tokens.where(whole.attended, filler), (0, columns), value=filler)
    others = (
        torch.nn.functional.pad(part, (0, columns), value=False) for part in (whole.attended, whole.answered)
    )
    return Batch(tokens, *others)


def gradients(method, model, batches, step=None):
    """The terms of one step, and the gradient of every trainable parameter by name (None where it has none)."""
    model.zero_grad(set_to_none=True)
    terms = method.backward(model, batches, step or Step(0, 10))
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad(set_to_none=True)
    return terms, found


def flat(gradient):
    """All of it as one float64 vector."""
    return torch.cat([part.double().flatten() for part in gradient.values() if part is not None])


def apart(one, other):
    """The distance of two gradients relative to the second's norm."""
    one, other = flat(one), flat(other)
    return float(torch.linalg.norm(one - other) / torch.linalg.norm(other))


def hooks(model):
    """How many hooks its modules carry, and how many have a forward of their own."""
    return sum(
        len(module._forward_hooks)
        + len(module._forward_pre_hooks)
        + len(module._backward_hooks)
        + ("forward" in vars(module))
        for module in model.modules()
    )
