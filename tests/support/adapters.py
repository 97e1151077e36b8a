"""PEFT adapters with made-up values, and what PEFT itself makes of them."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def load(folder, dtype=torch.float32):
    """The model in a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make(model, folder, *, seed=1, std=0.05, dtype=None, **settings):
    """An adapter of the model in a folder, every tensor of it drawn; returns its folder."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted = get_peft_model(load(model), LoraConfig(**settings))
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "magnitude" in name:
                    value.mul_(1 + 0.1 * torch.rand_like(value))
                elif "lora_" in name or "modules_to_save" in name:
                    value.add_(torch.randn_like(value) * std)
        if dtype is not None:
            adapted = adapted.to(dtype)
        adapted.save_pretrained(folder)
    return folder


def loaded(model, *adapters, dtype=torch.float32):
    """The model with adapters set up by PEFT, all of them active."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, *more = adapters
        adapted = PeftModel.from_pretrained(load(model, dtype), first, adapter_name="0").eval()
        for number, adapter in enumerate(more, 1):
            adapted.load_adapter(adapter, adapter_name=str(number))
    return adapted


def merged(model, *adapters, dtype=torch.float32):
    """The tensors of the model after PEFT merged the adapters, as transformers would save them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = loaded(model, *adapters, dtype=dtype).merge_and_unload(
            adapter_names=[str(number) for number in range(len(adapters))]
        )
    return whole


def ulps(one, other):
    """The largest distance of two float32 tensors, in units of the last place of the larger."""
    larger = torch.maximum(one.abs(), other.abs()).clamp(min=torch.finfo(one.dtype).tiny)
    unit = torch.exp2(torch.frexp(larger)[1].double() - 1) * torch.finfo(one.dtype).eps
    return float(((one.double() - other.double()).abs() / unit).max())


def logits(model, length=12):
    """Logits for a fixed text of tokens."""
    tokens = torch.arange(3, 3 + length).unsqueeze(0) * 7 % 120
    with torch.no_grad():
        return model(tokens).logits.float()
