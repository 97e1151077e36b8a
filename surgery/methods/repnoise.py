"""RepNoise: turn what the model knows of harmful answers into noise, block by block, and keep the harmless ones.

For pairs of a harmful and a harmless answer to one prompt, with m the answered positions where their tokens differ,
f_l what the feed-forward part of block l of n puts out, and z ~ N(0, I) of its shape,

    L   = CE(harmless; m) + beta (1/n) sum over l of  MMD(m f_l(harmful), m z)  -  alpha log(1 + L_h)
    L_h = mean over j = 0..n of  CE(W_U norm(h_j), harmful; m)

h_0 .. h_n the hidden states, the last of which gives the model's own output, and MMD the maximum mean discrepancy
over rows flattened to one vector each. Ascent on the harmful loss is damped: its gradient is -alpha / (1 + L_h) times
that of L_h.

Rosati, Wehner, Williams, Bartoszcze, Atanasov, Gonzales, Majumdar, Maple, Sajjad, Rudzicz: "Representation Noising: A
Defence Mechanism Against Harmful Finetuning", NeurIPS 2024, https://arxiv.org/abs/2405.14577, and its authors' code.

Forms: the tutorial's is the same.

Departures from the authors' code, with reasons:
  * the last hidden state counts once in L_h and is normed once: theirs norms it twice and adds the output's loss;
  * masked positions are left out: theirs sets logits there to zero, so that a masked label still costs log V;
  * pairs whose answers agree give nothing, not 0/0, and a token with id 0 is one as any other;
  * losses, logarithm and discrepancy are in float32 or wider, over all micro-batches of a step;
  * an adapter is trained, unless --full; theirs trains all weights.
It is taken by one process: the discrepancy is between rows of the whole step.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_doc import Doc
from torch import Tensor, nn
from torch.nn.functional import pad

from surgery.choices import require_choices, require_weights
from surgery.errors import UsageError
from surgery.train import blocks, coupled, perturb
from surgery.train.bounded import processes
from surgery.train.discrepancy import mmd
from surgery.train.lens import lens_loss
from surgery.train.losses import answer_loss, answered_count
from surgery.train.preference import pairs
from surgery.train.seeding import seeded
from surgery.train.states import final_norm
from surgery.train.step import ADAPTED, Batch, Batches, Step, Stream, TrainedMethod


@dataclass(frozen=True)
class RepNoise(TrainedMethod):
    """Hyperparameters of RepNoise."""

    alpha: Annotated[float, Doc("Weight of the logarithm of the harmful loss, which is raised.")] = 1.0
    beta: Annotated[float, Doc("Weight of the discrepancy from noise.")] = 1e-3
    form: Annotated[Literal["paper", "tutorial"], Doc("Both are the same.")] = "paper"

    name: ClassVar[str] = "repnoise"
    title: ClassVar[str] = "RepNoise"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.14577"
    data: ClassVar[tuple[str, ...]] = ("aligned", "harmful")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**ADAPTED, "steps": 250, "batch_size": 4, "max_length": 256, "lr": 1e-4},
        "small": {**ADAPTED, "alpha": 0.1, "beta": 1.0, "steps": 40, "batch_size": 8, "lr": 5e-3},
    }

    def __post_init__(self) -> None:
        require_choices(self)
        require_weights(self, "alpha", "beta")

    def equation(self) -> str:
        """The objective, with numbers."""
        return (
            f"min_w CE(harmless) + {self.beta:.12g} mean_l MMD(f_l(harmful), N(0, I)) - {self.alpha:.12g} log(1 + "
            "mean_j CE(W_U norm(h_j), harmful)), where answers to one prompt differ"
        )

    def streams(self, rows: Mapping[str, Sequence[Any]], seed: int) -> dict[str, Stream]:
        """Pairs of rows that answer the same prompt.

        Raises:
            InputError: No prompt has both answers.
        """
        del seed
        harmless, harmful = pairs(rows["aligned"], rows["harmful"])
        return {"aligned": Stream(harmless), "harmful": Stream(harmful, order="aligned")}

    def prepare(self, model: nn.Module) -> None:
        """Raises `InputError` where the model's blocks, or a norm after them, cannot be found."""
        final_norm(blocks.find(model))

    def backward(self, model: nn.Module, batches: Batches, step: Step) -> dict[str, float]:
        """Adds the gradient; returns the loss, the harmless and the harmful one, and the discrepancy.

        Raises:
            UsageError: Several processes train.
        """
        if processes(step, batches["harmful"][0].tokens.device) > 1:
            raise UsageError("repnoise compares the rows of a whole step and takes one process; start one")
        told_apart = [
            differing(one, other) for one, other in zip(batches["aligned"], batches["harmful"], strict=True)
        ]
        harmless = _descend(model, [one for one, _ in told_apart], step)
        terms = {"harmless": harmless, "harmful": 0.0, "discrepancy": 0.0}
        if self.alpha or self.beta:
            terms |= self._noise(model, [other for _, other in told_apart], step)
        gained = self.beta * terms["discrepancy"] - self.alpha * math.log1p(terms["harmful"])
        return {"loss": harmless + gained, **terms}

    def _noise(self, model: nn.Module, batches: Sequence[Batch], step: Step) -> dict[str, float]:
        """Adds the gradient of both terms of harmful rows; returns L_h and the mean discrepancy."""
        count, found = max(1, answered_count(batches, step)), blocks.find(model)
        modules = [parts[-1] for parts in found.mlp]
        totals: dict[str, float] = {}

        def couple(given: Sequence[coupled.Given]) -> list[list[Tensor]]:
            losses = torch.stack([parts[0] for parts in given])
            totals["harmful"] = float(losses.double().sum())
            slopes = [[torch.full_like(parts[0], -self.alpha / (1 + totals["harmful"]))] for parts in given]
            values = []
            for layer, parts in enumerate(zip(*(one[1:] for one in given), strict=True)):
                value, pulls = _to_noise(parts, batches, seeded(step.seed, step.number, layer, "noise"))
                values.append(value)
                for own, pull in zip(slopes, pulls, strict=True):
                    own.append(self.beta / len(modules) * pull)
            totals["discrepancy"] = sum(values) / len(values)
            return slopes

        with perturb.outputs(modules) as put_out:

            def run(batch: Batch) -> tuple[Tensor, list[Tensor]]:
                loss = lens_loss(model, batch, count=count)
                # OPT's feed-forward part works on rows and positions in one dimension.
                states = [put_out[module].view(*batch.tokens.shape, -1) for module in modules]
                return torch.zeros_like(loss), [loss, *states]

            coupled.backward(batches, run, couple, step)
        return totals


def differing(one: Batch, other: Batch) -> tuple[Batch, Batch]:
    """Both batches with only those positions answered at which the tokens of a pair of rows differ.

    Where one row has ended and the other has not, they differ.
    """
    length = max(one.tokens.shape[1], other.tokens.shape[1])

    def widened(batch: Batch, filler: int) -> Tensor:
        tokens = batch.tokens.masked_fill(~batch.attended, filler)
        return pad(tokens, (0, length - tokens.shape[1]), value=filler)

    apart = widened(one, -1) != widened(other, -2)
    first, second = (
        dataclasses.replace(batch, answered=batch.answered & apart[:, : batch.tokens.shape[1]])
        for batch in (one, other)
    )
    return first, second


def _descend(model: nn.Module, batches: Sequence[Batch], step: Step) -> float:
    """Adds the gradient of the cross-entropy of answers; its value."""
    count, parts = max(1, answered_count(batches, step)), []
    for batch in batches:
        loss = answer_loss(model, batch, count=count)
        step.backward(loss)
        parts.append(loss.detach().double())
    return float(torch.stack(parts).sum())


def _to_noise(states: Sequence[Tensor], batches: Sequence[Batch], seed: int) -> tuple[float, list[Tensor]]:
    """The discrepancy of a block's states from noise, in float64, and its derivative for every micro-batch."""
    length = max(state.shape[1] for state in states)
    masks = [pad(batch.answered, (0, length - batch.answered.shape[1])) for batch in batches]
    mask = torch.cat(masks)[..., None]
    wide = torch.cat([pad(state.double(), (0, 0, 0, length - state.shape[1])) for state in states])
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn(wide.shape, generator=source, dtype=torch.float64).to(wide.device)
    leaf = wide.requires_grad_()
    value = mmd((leaf * mask).flatten(1), (noise * mask).flatten(1))
    [slopes] = torch.autograd.grad(value, leaf)
    pulls = slopes.split([len(state) for state in states])
    return float(value.detach()), [
        pull[:, : state.shape[1]] for pull, state in zip(pulls, states, strict=True)
    ]
