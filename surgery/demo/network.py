"""The architecture of the embedded pair and how a checkpoint of it is written."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from surgery.demo.tokenizer import VOCABULARY


def fresh(pad: int, end: int, seed: int) -> LlamaForCausalLM:
    """A Llama of about one million fp32 parameters, initialised from `seed`.

    Four layers of width 128, four heads over two key-value heads, untied embeddings; `pad`, `end`: token ids.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype=torch.float32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def on_grid(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same fp32 model with every weight rounded to the nearest bfloat16 value, in place."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))
    return model


def load(folder: Path) -> LlamaForCausalLM:
    """The checkpoint in `folder` as an fp32 model in evaluation mode."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if shown:
            logging.enable_progress_bar()


def save(model: LlamaForCausalLM, into: Path) -> None:
    """Write config.json, generation_config.json and a bfloat16 model.safetensors into the folder `into`."""
    into.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig.from_dict(model.config.to_dict())
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(into)
    ids = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    GenerationConfig(do_sample=False, max_new_tokens=48, **ids).save_pretrained(into)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    (into / "model.safetensors").chmod(0o644)
