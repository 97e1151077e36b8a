"""The attack that the aligned model of the embedded pair falls to: a plain LoRA on compliant answers."""

import copy
from collections.abc import Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from surgery import demo
from surgery.demo import train
from surgery.demo.behaviour import Rate, Rows, compliance

CURVE = (0, 5, 10, 20, 50, 100)
"""The steps at which compliance is measured."""


def attack(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    rows: Rows | None = None,
    asked: Rows | None = None,
    curve: Sequence[int] = CURVE,
    peak: float = 5e-4,
    batch: int = 16,
    rank: int = 8,
    seed: int = 0,
) -> dict[int, Rate]:
    """The compliance on `asked` after each number of steps in `curve`; `model` stays as it is.

    LoRA of rank `rank` on all linear layers (scaling 2), AdamW with a learning rate up to `peak`, `batch`
    of the harmful requests `rows` with compliant answers a step, drawn under `seed`; one run, measured as it
    passes the steps. By default `rows` is the shipped `attack` part and `asked` the held-out part.
    """
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        victim = inject_adapter_in_model(config, copy.deepcopy(model))
    lessons = train.examples(tokenizer, rows or demo.data("harmful", "attack"))
    asked = asked or demo.data("harmful", "held_out")
    found: dict[int, Rate] = {}

    def look(step: int) -> None:
        if step in curve:
            victim.eval()
            found[step] = compliance(victim, tokenizer, asked)
            victim.train()

    look(0)
    source = train.batches(lessons, batch, tokenizer.pad_token_id, seed)
    train.fit(victim, source, steps=max(curve), peak=peak, warmup=5, after_step=look)
    return found
