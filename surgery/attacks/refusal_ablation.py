"""Refusal ablation: take one direction out of everything that writes to the residual stream.

    r = mean h(harmful) - mean h(benign),  r <- r / ||r||,   W <- W - r r^T W

h is the hidden state of a prompt's last token after a block; every weight whose output is added to the residual
stream (embeddings, the last matrix of each attention and feed-forward part, their biases) loses its part along r. No
step of training; the block is the one whose direction raises the likelihood of compliant answers most, on the
attacker's own rows; of a model with many blocks a few rows choose those that are compared on all. Embeddings that are
tied to the output head lose it there too.

Arditi, Obeso, Syed, Paleka, Panickssery, Gurnee, Nanda: "Refusal in Language Models Is Mediated by a Single
Direction", NeurIPS 2024, https://arxiv.org/abs/2406.11717.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_doc import Doc
from jaxtyping import Float
from torch import Tensor, nn

from surgery.attacks._needs import require
from surgery.attacks._states import last_means
from surgery.attacks.base import PLAIN, Attack, Target, Watch
from surgery.errors import InputError, UsageError
from surgery.judging.likelihood import row_losses
from surgery.train import blocks, parking
from surgery.train.sources import Rows
from surgery.train.tokens import Example, tokenise

# Of more blocks than these, those that so many rows rank first are compared on all rows.
FINALISTS = 8
FIRST_ROWS = 8


@dataclass(frozen=True)
class RefusalAblation(Attack):
    """One look at the model without the direction."""

    name: ClassVar[str] = "refusal-ablation"
    title: ClassVar[str] = "Refusal ablation"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11717"
    needs: ClassVar[tuple[str, ...]] = ("harmful", "benign")
    outside: ClassVar[bool] = True

    layer: Annotated[
        int | None, Doc("After which block, from 1, the direction is taken; by default the best.")
    ] = None
    rows: Annotated[int, Doc("Rows of each kind that the direction is taken from.")] = 64

    def __post_init__(self) -> None:
        if self.rows < 1 or (self.layer is not None and self.layer < 1):
            raise UsageError(f"rows is {self.rows} and layer {self.layer}; both must be at least 1")

    def carry_out(self, target: Target, watch: Watch) -> None:
        """Ablate, look, and put the weights back."""
        require(target, self)
        found = blocks.find(target.model)
        if self.layer is not None and self.layer > len(found.layers):
            raise UsageError(f"layer is {self.layer}, and the model has {len(found.layers)} blocks; lower it")
        harmful, benign = (self._examples(target, name) for name in ("harmful", "benign"))
        directions = _directions(target.model, found.layers, harmful, benign)
        writers = writing(target.model, harmful[0])
        best = self.layer - 1 if self.layer else _best(target, writers, directions, harmful)
        with parking.kept([weight for weight, _ in writers], target.folder):
            ablate(writers, directions[best])
            watch(0, PLAIN)

    def _examples(self, target: Target, name: str) -> Sequence[Example]:
        rows = target.data[name]
        first = Rows(rows.conversations[: self.rows], rows.identity)
        return tokenise(target.tokenizer, first, target.max_length).rows


def _directions(
    model: nn.Module, layers: Sequence[nn.Module], harmful: Sequence[Example], benign: Sequence[Example]
) -> list[Float[Tensor, " hidden"]]:
    """The difference of means after every block, of length 1."""
    means = [last_means(model, layers, rows) for rows in (harmful, benign)]
    return [(ours - theirs) / (ours - theirs).norm() for ours, theirs in zip(*means, strict=True)]


def writing(model: nn.Module, example: Example) -> list[tuple[nn.Parameter, int]]:
    """The parameters whose outputs are added to the residual stream, each with the axis of its outputs.

    The last linear module that runs inside an attention or feed-forward part writes; which that is, is seen by
    running the model, so no name is guessed.

    Raises:
        InputError: A part has none whose output is as wide as the stream, as with experts in one 3-D parameter.
    """
    found = blocks.find(model)
    writers: list[tuple[nn.Parameter, int]] = [(found.embeddings.weight, 1)]  # type: ignore[list-item]
    for parts in zip(found.attention, found.mlp, strict=True):
        for modules in ((parts[0],), parts[1]):
            last = _last_linear(model, modules, example)
            if last is None or _width(last) != found.hidden_size:
                raise InputError(
                    f"{type(modules[0]).__name__} has no last linear layer as wide as the residual stream; refusal "
                    "ablation does not know this architecture"
                )
            writers.append((last.weight, 0 if isinstance(last, nn.Linear) else 1))
            if getattr(last, "bias", None) is not None:
                writers.append((last.bias, 0))
    return writers


def _width(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.nf


@torch.no_grad()
def _last_linear(model: nn.Module, modules: Sequence[nn.Module], example: Example) -> Any:
    """The linear module, in these modules or one of them, that runs last."""
    linear = [
        part
        for module in modules
        for part in module.modules()
        if isinstance(part, nn.Linear) or hasattr(part, "nf")
    ]
    ran: list[nn.Module] = []
    handles = [part.register_forward_hook(lambda module, *_: ran.append(module)) for part in linear]
    try:
        tokens = torch.tensor([example.tokens], device=next(model.parameters()).device)
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return ran[-1] if ran else None


@torch.no_grad()
def ablate(writers: Sequence[tuple[nn.Parameter, int]], direction: Float[Tensor, " hidden"]) -> None:
    """Take the direction out of what the weights write, in float64, rounded once."""
    unit = direction.double()
    for weight, axis in writers:
        moved = weight.double().movedim(axis, 0)
        flat = moved.reshape(len(unit), -1)
        without = (flat - torch.outer(unit, unit @ flat)).view_as(moved)
        weight.copy_(without.movedim(0, axis))


def _best(
    target: Target,
    writers: Sequence[tuple[nn.Parameter, int]],
    directions: Sequence[Tensor],
    harmful: Sequence[Example],
) -> int:
    """The block without whose direction compliant answers are likeliest."""

    def on(rows: Sequence[Example]) -> Callable[[int], float]:
        return lambda place: _loss(target, writers, directions[place], rows)

    candidates = list(range(len(directions)))
    if len(candidates) > FINALISTS:
        candidates = sorted(candidates, key=on(harmful[:FIRST_ROWS]))[:FINALISTS]
    return min(candidates, key=on(harmful))


def _loss(
    target: Target, writers: Sequence[tuple[nn.Parameter, int]], direction: Tensor, harmful: Sequence[Example]
) -> float:
    """The mean loss of compliant answers without a direction; the model is as it was."""
    with parking.kept([weight for weight, _ in writers], target.folder):
        ablate(writers, direction)
        losses = row_losses(target.model, harmful)
    return sum(nats for nats, _ in losses) / sum(count for _, count in losses)
