"""Perturbation-aware alignment (Vaccine): align under the worst small change of the attention outputs.

With e_l the output of the attention module of block l, before it is added to the residual stream, L the
cross-entropy of the answers of an alignment batch and g_l = dL/de_l,

    min_w  max_{||(eps_1 .. eps_L)|| <= rho}  L(w; e_1 + eps_1, .. , e_L + eps_L)

is taken to first order: eps_l = rho * g_l / ||(g_1 .. g_L)||, one norm over all blocks, rows, tokens and hidden
units of a step together, and the weights get the gradient of L at these constant eps_l.

Huang, Hu, Liu: "Vaccine: Perturbation-aware Alignment for Large Language Models against Harmful Fine-tuning Attack",
NeurIPS 2024, https://arxiv.org/abs/2402.01109 (Algorithm 1). The tutorial's form is the same.

Departures from the authors' code, with reasons:
  * the norm is over all micro-batches and processes of a step: theirs is wrong under gradient accumulation, and per
    micro-batch it would be another method;
  * both passes use the same dropout masks: otherwise eps belongs to another network;
  * the norm is taken in float32 or wider; the first pass forms no gradient of any weight.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_doc import Doc
from torch import nn

from surgery.choices import require_choices
from surgery.errors import UsageError
from surgery.train import blocks
from surgery.train.step import Batches, Step, TrainedMethod
from surgery.train.worst_case import first_pass, second_pass

PAPER_TRAINING: Mapping[str, Any] = {
    "lr": 1e-3,
    "schedule": "cosine",
    "warmup": 0.1,
    "weight_decay": 0.1,
    "clip": 1.0,
    "lora_rank": 8,
    "lora_alpha": 1,
    "lora_dropout": 0.1,
}
"""What Vaccine and T-Vaccine train with, in the authors' scripts as they run."""


@dataclass(frozen=True)
class Vaccine(TrainedMethod):
    """Hyperparameters of Vaccine; rho is the paper's for Llama-2-7B."""

    rho: Annotated[
        float,
        Doc("Joint norm of the perturbations of a step, over all layers and tokens; 0 is plain training."),
    ] = 2.0
    form: Annotated[
        Literal["paper", "tutorial"], Doc("The tutorial's form is the paper's: either does the same.")
    ] = "paper"

    name: ClassVar[str] = "vaccine"
    title: ClassVar[str] = "Vaccine"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.01109"
    data: ClassVar[tuple[str, ...]] = ("aligned",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**PAPER_TRAINING, "steps": 20_000, "batch_size": 5},
        "small": {**PAPER_TRAINING, "steps": 100, "batch_size": 16, "lora_alpha": 16},
    }

    def __post_init__(self) -> None:
        require_choices(self)
        check_rho(self.rho)

    def equation(self) -> str:
        """The objective, with numbers."""
        return f"min_w max_(||(eps_1..eps_L)|| <= {self.rho:.12g}) L_aligned(w; e_l + eps_l), e_l: attention outputs"

    def prepare(self, model: nn.Module) -> None:
        """Raises `InputError` where the attention modules of the model cannot be found."""
        blocks.find(model)

    def backward(self, model: nn.Module, batches: Batches, step: Step) -> dict[str, float]:
        """Adds the gradient at the worst perturbation; returns that loss, the unperturbed one and the norm of g."""
        rows, modules = batches["aligned"], blocks.find(model).attention
        found = first_pass(model, rows, modules, step)
        return second_pass(model, rows, modules, found, self.rho, step)


def check_rho(rho: float) -> None:
    """Raises `UsageError` for a norm that is negative or not finite."""
    if not (math.isfinite(rho) and rho >= 0):
        raise UsageError(f"rho is {rho}; it must be a finite number of at least 0, as in --rho 2")
