"""Booster: align so that a step of harmful fine-tuning lowers the harmful loss by little.

With f the cross-entropy of aligned answers and h that of harmful ones,

    min_w  f(w) + lam * ( h(w) - h(w') ),    w' = w - alpha * g / ||g||,    g = dh/dw

so that what one normalised step of an attacker gains is kept small. The gradient is first-order, w' moving with w:

    df/dw (w) + lam * ( dh/dw (w) - dh/dw (w') )

Huang, Hu, Ilhan, Tekin, Liu: "Booster: Tackling Harmful Fine-tuning for Large Language Models via Attenuating Harmful
Perturbation", ICLR 2025, https://arxiv.org/abs/2409.01586 (Algorithm 1). The tutorial's form is the same; what it
calls harmful entropy loss is read as cross-entropy.

Departures from the authors' code, with reasons:
  * the norm is one over all trained weights, micro-batches and processes of a step: theirs is broken under gradient
    accumulation, and a norm per micro-batch would be another method;
  * both harmful passes use the same rows and the same dropout masks: otherwise their difference is noise;
  * the weights are put back from a copy, bit by bit, and not by adding again what was taken off;
  * the adapter sits on all linear layers of the blocks, as for the other methods, not on query, key and value alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_doc import Doc
from torch import Tensor, nn

from surgery.choices import require_choices
from surgery.errors import UsageError
from surgery.train import blocks, perturb
from surgery.train.losses import answer_loss, answered_count
from surgery.train.step import Batch, Batches, Step, TrainedMethod

# The authors' guard against a gradient of zero.
_GUARD = 1e-7


@dataclass(frozen=True)
class Booster(TrainedMethod):
    """Hyperparameters of Booster; the defaults are the paper's for Llama-2-7B."""

    lam: Annotated[
        float, Doc("Weight of what a harmful step gains beside the aligned loss; 0 is plain training.")
    ] = 5.0
    alpha: Annotated[float, Doc("Length of the simulated harmful step, over all trained weights.")] = 0.1
    form: Annotated[
        Literal["paper", "tutorial"], Doc("The tutorial's form is the paper's: either does the same.")
    ] = "paper"

    name: ClassVar[str] = "booster"
    title: ClassVar[str] = "Booster"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.01586"
    data: ClassVar[tuple[str, ...]] = ("aligned", "harmful")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "steps": 10_000,
            "batch_size": 10,
            "max_length": 256,
            "lr": 5e-4,
            "schedule": "constant",
            "warmup": 0.0,
            "weight_decay": 0.1,
            "lora_rank": 32,
            "lora_alpha": 4,
            "lora_dropout": 0.0,
        },
        "small": {
            "steps": 80,
            "batch_size": 16,
            "lr": 2e-3,
            "schedule": "constant",
            "warmup": 0.0,
            "weight_decay": 0.1,
            "lora_rank": 16,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
        },
    }

    def __post_init__(self) -> None:
        require_choices(self)
        for option in ("lam", "alpha"):
            value = getattr(self, option)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{option} is {value}; it must be a finite number of at least 0")

    def equation(self) -> str:
        """The objective, with numbers."""
        return (
            f"min_w L_aligned(w) + {self.lam:.12g} (L_harmful(w) - L_harmful(w - {self.alpha:.12g} g/||g||)), "
            "g = dL_harmful/dw, first order"
        )

    def prepare(self, model: nn.Module) -> None:
        """Raises `InputError` where the blocks of the model cannot be found."""
        blocks.find(model)

    def backward(self, model: nn.Module, batches: Batches, step: Step) -> dict[str, float]:
        """Adds the first-order gradient; returns the loss, f(w), h(w) and h(w')."""
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        gained: list[Tensor | None] = [None] * len(weights)
        before = after = 0.0
        if self.lam > 0:
            state, count = perturb.randomness(), answered_count(batches["harmful"], step)

            def harmful() -> Tensor:
                # The masks of plain training are left for the aligned pass.
                with perturb.replayed(state):
                    return _descend(model, batches["harmful"], count, step)

            gained, before, after = attenuated(weights, harmful, self.alpha, step)
        aligned = _descend(model, batches["aligned"], answered_count(batches["aligned"], step), step)
        for weight, gain in zip(weights, gained, strict=True):
            if gain is not None:
                weight.grad = (
                    gain.mul_(self.lam) if weight.grad is None else weight.grad.add_(gain, alpha=self.lam)
                )
        kept = float(step.summed(aligned))
        return {
            "loss": kept + self.lam * (before - after),
            "aligned": kept,
            "harmful": before,
            "after_step": after,
        }


def attenuated(
    weights: Sequence[nn.Parameter], descend: Callable[[], Tensor], alpha: float, step: Step
) -> tuple[list[Tensor | None], float, float]:
    """This process's part of `g(w) - g(w')` weight by weight, and h(w) and h(w') over all processes.

    Args:
        weights: What is trained; without gradients now, and again afterwards.
        descend: Adds this process's gradient of h at the present weights, and returns its part of h.
        alpha: Length of the step from w to w'.
        step: Adds up over processes.
    """
    before = step.summed(descend())
    own = [None if weight.grad is None else weight.grad.clone() for weight in weights]
    step.join(weights)
    with stepped(weights, alpha):
        _forget(weights)
        after = step.summed(descend())
    gained = [_less(one, weight.grad) for one, weight in zip(own, weights, strict=True)]
    _forget(weights)
    return gained, float(before), float(after)


@contextmanager
def stepped(weights: Sequence[nn.Parameter], alpha: float) -> Iterator[None]:
    """The weights moved by `alpha` against their gradients, one norm over all; inside the with-block alone."""
    moved = [weight for weight in weights if weight.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm([weight.grad for weight in moved if weight.grad is not None])
    scale = alpha / (float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) + _GUARD)
    with perturb.restored(moved):
        with torch.no_grad():
            for weight in moved:
                weight.sub_(weight.grad, alpha=scale)  # type: ignore[arg-type]
        yield


def _less(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The difference in the first one's place, where None is zero."""
    if other is None:
        return one
    return -other if one is None else one.sub_(other)


def _descend(model: nn.Module, batches: Sequence[Batch], count: int, step: Step) -> Tensor:
    """Adds the gradient of the loss of all micro-batches; this process's part of that loss, in float64."""
    losses = []
    for batch in batches:
        loss = answer_loss(model, batch, count=count)
        step.backward(loss)
        losses.append(loss.detach().double())
    return torch.stack(losses).sum()


def _forget(weights: Sequence[nn.Parameter]) -> None:
    for weight in weights:
        weight.grad = None
