"""Targeted Vaccine (T-Vaccine): perturb and train a few layers at a time, those that harmful data moves most.

With e_l the output of the attention module of block l,

    s_l = ||dL(harmful)/de_l||,   p_l = s_l / sum_j s_j,   S: gamma blocks drawn by p without replacement
    eps_l = rho * g_l / ||(g_l) for l in S||  for l in S, and 0 elsewhere,   g_l = dL(aligned)/de_l

and only the blocks in S are trained, with the gradient at these constant eps_l. The norm is over the blocks in S
alone, and over all rows, tokens and hidden units of a step.

Liu, Lin, Huang, Mo, Mu, Shen: "Targeted Vaccine: Safety Alignment for Large Language Models against Harmful
Fine-Tuning via Layer-wise Perturbation", IEEE TIFS 2025, https://arxiv.org/abs/2410.09760.

Forms: `paper` draws S every `redraw_every` steps, as the authors' code does; `tutorial` draws it at every step. p is
computed every `refresh_every` steps in both.

Departures from the authors' code, with reasons:
  * blocks outside S are wholly frozen, as the paper means it: the code goes on training their MLP adapters, and those
    before the first block of S or not depending on which call checkpoints them;
  * what is frozen has no gradient at all, so that neither momentum nor weight decay moves it;
  * nothing before the first block of S is kept for the backward pass, and of half of the other blocks outside S the
    second pass keeps only large products, where the code checkpoints them all, which takes a forward pass more;
  * p comes from all harmful rows of a step and not from one example, which is noisy;
  * one norm over all micro-batches and processes, and equal dropout masks in both passes, as for Vaccine.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_doc import Doc
from torch import nn

from surgery.choices import require_choices
from surgery.errors import OutputError, UsageError
from surgery.methods.vaccine import PAPER_TRAINING, check_rho
from surgery.train import blocks, perturb
from surgery.train.losses import answered_count
from surgery.train.recompute import thrifty
from surgery.train.step import Batch, Batches, Step, TrainedMethod
from surgery.train.worst_case import first_pass, output_gradients, second_pass

# Share of the blocks that only pass gradients on which keep little in the second pass and compute the rest again: it
# then holds three quarters of Vaccine's (at rank 8), as the first pass does anyway, which keeps nothing for weights.
_THRIFTY = 0.55


@dataclass(frozen=True)
class TVaccine(TrainedMethod):
    """Hyperparameters of T-Vaccine; the defaults are the paper's for Llama-2-7B."""

    rho: Annotated[
        float, Doc("Joint norm of the perturbations of a step, over the layers drawn and all tokens.")
    ] = 3.0
    gamma: Annotated[int, Doc("Layers that are perturbed and trained at a time.")] = 8
    redraw_every: Annotated[int, Doc("Steps for which the layers drawn stay the same.")] = 20
    refresh_every: Annotated[int, Doc("Steps for which the probabilities of the layers stay the same.")] = 200
    form: Annotated[
        Literal["paper", "tutorial"], Doc("tutorial: the layers are drawn anew at every step.")
    ] = "paper"

    name: ClassVar[str] = "t-vaccine"
    title: ClassVar[str] = "T-Vaccine"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.09760"
    data: ClassVar[tuple[str, ...]] = ("aligned", "harmful")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**PAPER_TRAINING, "steps": 4000, "batch_size": 10, "max_length": 200},
        "small": {**PAPER_TRAINING, "gamma": 1, "steps": 100, "batch_size": 16, "lora_alpha": 16},
    }

    def __post_init__(self) -> None:
        require_choices(self)
        check_rho(self.rho)
        for option in ("gamma", "redraw_every", "refresh_every"):
            if (value := getattr(self, option)) < 1:
                raise UsageError(f"{option.replace('_', '-')} is {value}; it must be at least 1")

    def equation(self) -> str:
        """The objective, with numbers."""
        every = 1 if self.form == "tutorial" else self.redraw_every
        return (
            f"min_(w_S) max_(||(eps_l) for l in S|| <= {self.rho:.12g}) L_aligned(w; e_l + eps_l), S: {self.gamma} "
            f"layers by p_l ~ ||dL_harmful/de_l||, drawn every {every} steps, p every {self.refresh_every}"
        )

    def prepare(self, model: nn.Module) -> None:
        """Checks that the layers can be found and are enough.

        Raises:
            InputError: The model is not understood.
            UsageError: It has fewer than `gamma` layers.
        """
        depth = len(blocks.find(model).layers)
        if self.gamma > depth:
            raise UsageError(
                f"gamma is {self.gamma}; the model has {depth} layers: give --gamma 1 to {depth}"
            )

    def backward(self, model: nn.Module, batches: Batches, step: Step) -> dict[str, float]:
        """Adds the gradient under the worst perturbation to the layers drawn; all others keep none.

        Returns:
            The perturbed loss, the unperturbed one and the norm of the gradient with respect to the outputs.
        """
        found = blocks.find(model)
        drawn = self._layers(model, found, batches, step)
        trained = {id(weight) for index in drawn for weight in found.layers[index].parameters()}
        others = [
            weight for weight in model.parameters() if weight.requires_grad and id(weight) not in trained
        ]
        attention = [found.attention[index] for index in drawn]
        passed = [found.layers[index] for index in range(drawn[0], len(found.layers)) if index not in drawn]
        rows, sparing = batches["aligned"], passed[: round(_THRIFTY * len(passed))]
        with perturb.frozen(others), perturb.without_history(found.layers[0]):
            unperturbed = first_pass(model, rows, attention, step)
            with thrifty(sparing):
                terms = second_pass(model, rows, attention, unperturbed, self.rho, step)
        for weight in others:
            weight.grad = None
        return terms

    def _layers(self, model: nn.Module, found: blocks.Blocks, batches: Batches, step: Step) -> list[int]:
        """The layers of this step in ascending order, from memory or drawn now."""
        memory = step.memory
        if step.number % self.refresh_every == 0 or "probabilities" not in memory:
            with thrifty(found.layers):
                memory["probabilities"] = probabilities(model, batches["harmful"], found.attention, step)
        every = 1 if self.form == "tutorial" else self.redraw_every
        if step.number % every == 0 or "layers" not in memory:
            memory["layers"] = draw(memory["probabilities"], self.gamma, f"{step.seed} {step.number}")
        return memory["layers"]


def probabilities(
    model: nn.Module, batches: Sequence[Batch], attention: Sequence[nn.Module], step: Step
) -> list[float]:
    """The share of every layer in the norms of the loss's gradient with respect to attention outputs; all equal at 0.

    Raises:
        OutputError: A norm is not finite.
    """
    count = answered_count(batches, step)
    with perturb.replayed(perturb.randomness()):
        energies = [perturb.energy(output_gradients(model, batch, attention, count)[1]) for batch in batches]
    norms = step.summed(torch.stack(energies).sum(0)).sqrt().tolist()
    if not all(map(math.isfinite, norms)):
        raise OutputError(f"the gradient on harmful data is not finite at step {step.number}; lower --lr")
    total = math.fsum(norms)
    return [norm / total for norm in norms] if total else [1 / len(norms)] * len(norms)


def draw(chances: Sequence[float], size: int, key: str) -> list[int]:
    """`size` distinct positions, ascending, drawn one after the other with these chances among those left.

    The positions with the largest log(u) / p are just such a draw (Efraimidis and Spirakis 2006). `key` fixes it.
    """
    source = random.Random(f"t-vaccine {key}")
    uniform = [1 - source.random() for _ in chances]
    keys = [math.log(u) / p if p > 0 else -math.inf for u, p in zip(uniform, chances, strict=True)]
    return sorted(sorted(range(len(keys)), key=lambda index: -keys[index])[:size])
