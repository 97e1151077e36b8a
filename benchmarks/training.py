"""What a step of each trained method costs beside plain fine-tuning of the same adapter, in one run.

Random weights of the shape of a 135M Llama, batch 4 x 128, LoRA of rank 8, one thread.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import Measured, Row, alternated, median, spread, timed
from surgery.methods.booster import Booster
from surgery.methods.circuit_breakers import CircuitBreakers
from surgery.methods.t_vaccine import TVaccine
from surgery.methods.vaccine import Vaccine
from surgery.train import blocks, recompute
from surgery.train.losses import answer_loss, answered_count
from surgery.train.step import Batch, Batches, Step, TrainedMethod

ROWS, LENGTH, RANK = 4, 128, 8
TARGETS = {"vaccine": 2.1, "t-vaccine": 2.05, "circuit-breakers": 2.2, "booster": 3.1}
SAVED_TARGET = 0.75
POLICY = recompute._policy
# Draws of layers over which what T-Vaccine saves is averaged.
DRAWS = 5


@dataclass(frozen=True)
class Plain:
    """Plain fine-tuning on the answers, as a control."""

    name = "sft"

    def backward(self, model: nn.Module, batches: Batches, step: Step) -> dict[str, float]:
        """One pass forward, one back."""
        count = answered_count(batches["aligned"], step)
        losses = []
        for batch in batches["aligned"]:
            loss = answer_loss(model, batch, count=count)
            step.backward(loss)
            losses.append(float(loss.detach()))
        return {"loss": sum(losses)}


Objective = TrainedMethod | Plain


def shape(depth: int = 30, vocabulary: int = 49152) -> LlamaConfig:
    """The config of a Llama of 135 million parameters."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=depth,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def adapted(config: LlamaConfig, method: Objective) -> nn.Module:
    """A random model of this shape with an adapter on the blocks that the method trains, ready for a step."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config)
    depth = config.num_hidden_layers
    layers = method.layers(depth) if isinstance(method, TrainedMethod) else range(depth)
    lora = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=blocks.linear_names(plain, layers),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(plain, lora)
    if isinstance(method, TrainedMethod):
        method.prepare(model)
    return model.train()


def batches(vocabulary: int) -> Batches:
    """A batch of every data set: full rows, the second half of each an answer."""
    source = torch.Generator().manual_seed(0)
    attended = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    answered = attended.clone()
    answered[:, : LENGTH // 2] = False
    names = ("aligned", "harmful", "retain")
    drawn = {name: torch.randint(vocabulary, (ROWS, LENGTH), generator=source) for name in names}
    return {name: [Batch(tokens, attended, answered)] for name, tokens in drawn.items()}


def stepper(method: Objective, config: LlamaConfig, data: Batches) -> Callable[[], None]:
    """One whole step of training: gradients, clipping, AdamW."""
    model = adapted(config, method)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-4)
    # Not at 0, where T-Vaccine looks at harmful data (once in 200 steps).
    step = Step(0, 1000)
    method.backward(model, data, step)
    optimiser.zero_grad()

    def run() -> None:
        step.number += 1
        method.backward(model, data, step)
        torch.nn.utils.clip_grad_norm_([weight for weight in weights if weight.grad is not None], 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return run


class Held:
    """Bytes, beside the weights, that autograd and selective checkpointing hold for the backward pass to come."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.sizes: dict[int, int] = {}
        self.at_backward = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def policy(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """The policy of `surgery.train.recompute`, whose kept outputs autograd's hooks do not see."""
        decision = POLICY(context, operator, *args, **kwargs)
        if decision == CheckpointPolicy.MUST_SAVE and not context.is_recompute:
            outputs = (
                context.op_output if isinstance(context.op_output, (tuple, list)) else [context.op_output]
            )
            for output in outputs:
                if isinstance(output, Tensor):
                    self.keep(output)
        return decision

    def backward(self, loss: Tensor) -> None:
        """Note what is held, then go back."""
        self.at_backward = sum(self.sizes.values())
        loss.backward()


def saved(method: Objective, config: LlamaConfig, data: Batches, draws: int) -> float:
    """Bytes held when the backward pass to the weights begins, averaged over draws of layers."""
    model = adapted(config, method)
    held = Held(model)
    model.register_forward_pre_hook(lambda *_: held.sizes.clear())
    total = 0
    for seed in range(draws):
        step = Step(0, 1000, seed=seed)
        if isinstance(method, TVaccine):
            method.backward(model, data, step)
        step.number, step.backward = 1, held.backward
        with (
            mock.patch.object(recompute, "_policy", held.policy),
            torch.autograd.graph.saved_tensors_hooks(held.keep, lambda tensor: tensor),
        ):
            method.backward(model, data, step)
        model.zero_grad()
        total += held.at_backward
    return total / draws


def rows(repeats: int) -> list[Row]:
    """Processor time per step, and activations held for the backward pass to the weights, each as a ratio."""
    torch.set_num_threads(1)
    config = shape()
    data = batches(config.vocab_size)
    methods: tuple[Objective, ...] = (Plain(), Vaccine(), TVaccine(), CircuitBreakers(), Booster())
    steppers = {method.name: stepper(method, config, data) for method in methods}
    ways: dict[str, Callable[[], Measured]] = {
        name: lambda run=run: timed(run) for name, run in steppers.items()
    }  # type: ignore[misc]
    found = alternated(ways, repeats)
    plain = median(found["sft"], "core")
    lines = [
        Row(
            f"135M, 4 x 128, LoRA of rank 8: step of {name} / plain fine-tuning",
            median(found[name], "core") / plain,
            "x",
            f"at most {most}",
            median(found[name], "core") / plain <= most,
            f"wall {spread(found[name])} to {spread(found['sft'])}",
        )
        for name, most in TARGETS.items()
    ]
    del steppers
    gc.collect()
    whole = saved(Vaccine(), config, data, 1)
    targeted = saved(TVaccine(), config, data, DRAWS)
    ratio = targeted / whole
    detail = f"{targeted / 1e6:.0f} MB to {whole / 1e6:.0f} MB, mean of {DRAWS} draws"
    lines.append(
        Row(
            "saved activations: t-vaccine / vaccine",
            ratio,
            "x",
            f"at most {SAVED_TARGET}",
            ratio <= SAVED_TARGET,
            detail,
        )
    )
    return lines
