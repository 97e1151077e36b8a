"""Circuit Breakers (representation rerouting): turn the hidden states of harmful text away from what they were.

With h the hidden states of the adapted model and h0 those of the same model with its adapter off, at step t of T,

    L   = c_s L_s + c_r L_r,    c_s = alpha (1 - t / 2T),    c_r = alpha t / 2T
    L_s = mean over target layers and tokens of harmful rows of  max(0, cos(h, h0))
    L_r = mean over all layers (embeddings to final norm) and tokens of retain rows of  ||h - h0||_2

Zou, Phan, Wang, Duenas, Lin, Andriushchenko, Wang, Kolter, Fredrikson, Hendrycks: "Improving Alignment and Robustness
with Circuit Breakers", NeurIPS 2024, https://arxiv.org/abs/2406.04313 (Algorithm 1). It was not made to withstand
fine-tuning, and a little of it undoes it.

Forms: `paper` as above, the norm not squared and the coefficients ending at alpha/2 each; `tutorial` squares the norm
and hands over fully, c_s = alpha (1 - t / T), c_r = alpha t / T; `relative` is the paper's with ||h - h0|| / ||h0||
in L_r. L_s does not change with the size of hidden states, and the paper's L_r is proportional to it: their balance
is one for models like the authors'. Where states are large (SmolLM2-135M: norms of 140 to 230 at the targets, 24 000
at a text's first token) L_r alone is trained. `relative` has the same balance on every model.

As in the authors' code, targets count hidden states (0 is the embeddings, l what block l - 1 puts out), all tokens of
prompt and response count, and while it trains the model is cut after the block that the last target enters.

Departures from the authors' code, with reasons:
  * the adapter's B starts at small seeded noise: at B = 0 the cosine is 1 and its gradient 0, and training begins
    wherever rounding errors lead (never, in bfloat16), or the retain term, whose gradient is large at any distance,
    holds it there;
  * padding counts in neither mean (theirs dilutes L_r by it), and means are over all micro-batches and processes;
  * t counts steps and T is their number: theirs is tied to 150 steps and counts micro-batches;
  * a hidden state of norm 0 has cosine 0 and gradient 0, not NaN.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_doc import Doc
from torch import Tensor, nn

from surgery.choices import require_choices, require_weights, whole_numbers
from surgery.errors import UsageError
from surgery.kernels.rerouting import rerouting_loss
from surgery.train import blocks, perturb
from surgery.train.spreading import placed_like
from surgery.train.states import States, distance, final_norm, hidden_states
from surgery.train.step import Batch, Batches, Step, TrainedMethod

# Cosine of the rerouted states with what they were, above which little has been rerouted; and a mean distance beside
# whose gradient that of the rerouting is lost.
_UNTURNED, _LARGE = 0.9, 10.0


@dataclass(frozen=True)
class CircuitBreakers(TrainedMethod):
    """Hyperparameters of Circuit Breakers; alpha is the paper's for Llama-3-8B."""

    alpha: Annotated[float, Doc("Weight of both terms together; Adam hardly feels it.")] = 10.0
    targets: Annotated[
        str | None,
        Doc(
            "Hidden states to reroute, as in 10,20: 0 is the embeddings; by default at 10/32 and 20/32 of the depth."
        ),
    ] = None
    start: Annotated[float, Doc("Standard deviation of the noise that the adapter's B starts from.")] = 1e-2
    form: Annotated[
        Literal["paper", "tutorial", "relative"],
        Doc(
            "tutorial: squared distance, and coefficients that hand over fully; relative: distance in units of the "
            "hidden state, for models whose states are large."
        ),
    ] = "paper"

    name: ClassVar[str] = "circuit-breakers"
    title: ClassVar[str] = "Circuit Breakers"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.04313"
    data: ClassVar[tuple[str, ...]] = ("harmful", "retain")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "steps": 150,
            "batch_size": 16,
            "max_length": 1024,
            "lr": 1e-4,
            "schedule": "constant",
            "warmup": 0.0,
            "weight_decay": 0.0,
            "lora_rank": 16,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
        },
        "small": {
            "steps": 100,
            "batch_size": 8,
            "lr": 5e-3,
            "schedule": "constant",
            "warmup": 0.0,
            "weight_decay": 0.0,
            "lora_rank": 16,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
        },
    }

    def __post_init__(self) -> None:
        require_choices(self)
        require_weights(self, "alpha", "start")
        if self.alpha == 0:
            raise UsageError("alpha is 0; nothing would be trained: give --alpha 10")
        self._named_targets()

    def _named_targets(self) -> list[int] | None:
        return None if self.targets is None else whole_numbers(self.targets, "targets")

    def targets_of(self, depth: int) -> list[int]:
        """The hidden states that are rerouted in a model of `depth` blocks, ascending, from 1 to `depth`.

        Raises:
            UsageError: A target lies beyond the last block.
        """
        named = self._named_targets() or sorted({max(1, (2 * depth * part + 32) // 64) for part in (10, 20)})
        if named[-1] > depth:
            raise UsageError(f"targets is {self.targets!r}; the model has {depth} layers: name 1 to {depth}")
        return named

    def layers(self, depth: int) -> range:
        """The blocks that are adapted: up to the one that the last target enters."""
        return range(min(depth, self.targets_of(depth)[-1] + 1))

    def coefficients(self, done: float) -> tuple[float, float]:
        """c_s and c_r where a share `done` of the steps is done; they add up to alpha."""
        retained = self.alpha * done / (1 if self.form == "tutorial" else 2)
        return self.alpha - retained, retained

    def equation(self) -> str:
        """The objective, with numbers."""
        end = "T" if self.form == "tutorial" else "2T"
        apart = {"tutorial": "||h - h0||^2", "relative": "||h - h0|| / ||h0||"}.get(self.form, "||h - h0||")
        where = (
            f"hidden states {self.targets}"
            if self.targets
            else "hidden states at 10/32 and 20/32 of the depth"
        )
        return (
            f"min_w {self.alpha:.12g} [(1 - t/{end}) mean max(0, cos(h, h0)) + t/{end} mean {apart}], "
            f"cosine on harmful rows at {where}, distance on retain rows everywhere"
        )

    def signs(self, first: Mapping[str, float], last: Mapping[str, float]) -> tuple[str, ...]:
        """Says so where harmful states still point where they did in the last step, before anything is spared."""
        del first
        if last["rerouting"] <= _UNTURNED:
            return ()
        drowned = last["retain"] > {"paper": _LARGE, "tutorial": _LARGE**2}.get(self.form, math.inf)
        advice = (
            "--form relative, as the hidden states are large" if drowned else "a larger --lr or more --steps"
        )
        return (
            f"rerouting is {last['rerouting']:.2f} at the last step: the hidden states of harmful rows point "
            f"nearly where they did, and little is defended; take {advice}",
        )

    def prepare(self, model: nn.Module) -> None:
        """Checks model and targets.

        Raises:
            InputError: The model is not understood, or its decoder has no final norm.
            UsageError: It has no adapter that can be turned off, or a target lies beyond its last block.
        """
        found = blocks.find(model)
        self.targets_of(len(found.layers))
        final_norm(found)
        if not callable(getattr(model, "disable_adapter", None)):
            raise UsageError(
                "circuit-breakers compares the model with and without its adapter: leave out --full"
            )

    def backward(self, model: nn.Module, batches: Batches, step: Step) -> dict[str, float]:
        """Adds the gradient of both terms; returns the loss, L_s, L_r and the share c_r / alpha."""
        if step.number == 0:
            leave_the_start(model, self.start, step.seed)
        found = blocks.find(model)
        targets = self.targets_of(len(found.layers))
        rerouted, retained = self.coefficients((step.number + 1) / step.total)

        def turn(now: States, before: States, attended: Tensor) -> Tensor:
            return rerouting(now, before, attended, targets)

        def keep(now: States, before: States, attended: Tensor) -> Tensor:
            squared, relative = self.form == "tutorial", self.form == "relative"
            return distance(now, before, attended, squared=squared, relative=relative)

        with blocks.shortened(found, len(self.layers(len(found.layers)))):
            terms = [
                _mean_backward(model, found, batches["harmful"], turn, rerouted, step),
                _mean_backward(model, found, batches["retain"], keep, retained, step),
            ]
        turned, kept = step.summed(torch.stack(terms)).tolist()
        total = rerouted * turned + retained * kept
        return {"loss": total, "rerouting": turned, "retain": kept, "retain_share": retained / self.alpha}


def rerouting(now: States, before: States, attended: Tensor, targets: Sequence[int]) -> Tensor:
    """The sum over attended tokens of max(0, cosine), averaged over the hidden states `targets`."""
    ours, theirs = (torch.stack([states[index] for index in targets]) for states in (now, before))
    return rerouting_loss(ours, theirs, attended) * attended.sum()


def leave_the_start(model: nn.Module, size: float, seed: int) -> None:
    """Fills every B of LoRA that is wholly zero with seeded normal noise of standard deviation `size`."""
    for name, weight in model.named_parameters():
        if not weight.requires_grad or ".lora_B." not in name or bool(weight.detach().any()):
            continue
        # The generator uses 32 bits of its seed.
        source = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        noise = size * torch.randn(weight.shape, generator=source)
        with torch.no_grad():
            weight.copy_(placed_like(noise.to(weight.dtype), weight))


def _mean_backward(
    model: nn.Module,
    found: blocks.Blocks,
    batches: Sequence[Batch],
    summed: Callable[[States, States, Tensor], Tensor],
    weight: float,
    step: Step,
) -> Tensor:
    """Adds the gradient of `weight` times the mean over all attended tokens; this process's share of that mean."""
    own = torch.stack([batch.attended.sum() for batch in batches]).sum()
    count = step.summed(own)
    shares = []
    for batch in batches:
        with torch.no_grad(), perturb.evaluating(model), model.disable_adapter():  # type: ignore[operator]
            before = hidden_states(model, found, batch)
        share = summed(hidden_states(model, found, batch), before, batch.attended) / count
        step.backward(weight * share)
        shares.append(share.detach().double())
    return torch.stack(shares).sum()
