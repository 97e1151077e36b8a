"""What a step of each trained method costs beside plain fine-tuning of the same adapter, in one run.

Random weights of the shape of a 135M Llama, batch 4 x 128, LoRA of rank 8, one thread.
"""

import gc
from collections.abc import Callable
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
from surgery.methods.condition_number import ConditionNumber
from surgery.methods.repnoise import RepNoise
from surgery.methods.t_vaccine import TVaccine
from surgery.methods.vaccine import Vaccine
from surgery.train import blocks, recompute
from surgery.train.sft import SFT
from surgery.train.step import Batch, Batches, Step, TrainedMethod

ROWS, LENGTH, RANK = 4, 128, 8
# Condition Number runs 19 of the 30 blocks on harmful rows.
TARGETS: dict[str, float | None] = {
    "vaccine": 2.1,
    "t-vaccine": 2.05,
    "circuit-breakers": 2.2,
    "booster": 3.1,
    "condition-number": 1.1 * (1 + 19 / 30),
    "repnoise": None,
}
SAVED_TARGET = 0.75
POLICY, GRAD = recompute._policy, torch.autograd.grad
# Draws of layers over which what T-Vaccine saves is averaged.
DRAWS = 5


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


def adapted(config: LlamaConfig, method: TrainedMethod) -> nn.Module:
    """A random model of this shape with an adapter on the blocks that the method trains, ready for a step."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config)
    depth = config.num_hidden_layers
    lora = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=blocks.linear_names(plain, method.layers(depth)),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(plain, lora)
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


def stepper(method: TrainedMethod, config: LlamaConfig, data: Batches) -> Callable[[], None]:
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
        self.most = 0

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

    def note(self) -> None:
        """Remember what is held now, if it is the most so far."""
        self.most = max(self.most, sum(self.sizes.values()))

    def backward(self, loss: Tensor) -> None:
        """The second pass: note what is held, then go back to the weights."""
        self.note()
        loss.backward()

    def grad(self, *args: Any) -> Any:
        """The first pass: note what is held, then go back to the outputs."""
        self.note()
        return GRAD(*args)


def saved(method: TrainedMethod, config: LlamaConfig, data: Batches, draws: int) -> float:
    """The most bytes held when a backward pass of a first step begins, of all its passes; averaged over draws."""
    model = adapted(config, method)
    total = 0
    for seed in range(draws):
        held = Held(model)
        clearing = model.register_forward_pre_hook(lambda *_, held=held: held.sizes.clear())
        with (
            mock.patch.object(recompute, "_policy", held.policy),
            mock.patch.object(torch.autograd, "grad", held.grad),
            torch.autograd.graph.saved_tensors_hooks(held.keep, lambda tensor: tensor),
        ):
            method.backward(model, data, Step(0, 1000, seed=seed, backward=held.backward))
        clearing.remove()
        model.zero_grad()
        total += held.most
    return total / draws


def rows(repeats: int) -> list[Row]:
    """Processor time per step, and activations held for the backward pass to the weights, each as a ratio."""
    torch.set_num_threads(1)
    config = shape()
    data = batches(config.vocab_size)
    methods: tuple[TrainedMethod, ...] = (
        SFT(),
        Vaccine(),
        TVaccine(),
        CircuitBreakers(),
        Booster(),
        ConditionNumber(),
        RepNoise(),
    )
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
            f"at most {most:.3g}" if most else "",
            median(found[name], "core") / plain <= most if most else None,
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
