"""An adapter that leaves innocent inputs alone: what it does along their leading directions is taken out of it.

With X the inputs that a linear layer gets on the tokens of retain rows, (tokens, in), and Q, (in, m), the fewest
right singular vectors of X that carry a share of its energy ||X||_F^2, training ends with

    A <- A - (A Q) Q^T

so that B A Q = 0: the layer's output along Q is what it was before training. X is not centred: what is to stay is the
output, not its spread. Inputs of language models have most of their energy in a few directions that all texts share:
half of it in the median 0.7 % of them (SmolLM2-135M, docs/evidence.md).

Once, at the end, and not after every step, which is projected gradient descent: held to the other directions all the
while, Circuit Breakers went further along them and broke innocent answers (SmolLM2-135M, share 0.9: KL of 1.9 nats,
without any bound 0.2). For the idea of keeping out of where known inputs have their energy see Saha, Garg, Roy:
"Gradient Projection Memory for Continual Learning", ICLR 2021, https://arxiv.org/abs/2103.09762; theirs projects the
gradients of whole weights, of one task after another.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import UsageError
from surgery.train import blocks, perturb
from surgery.train.crew import Crew
from surgery.train.feed import drawn, padded
from surgery.train.step import TrainedMethod
from surgery.train.tokens import Example

# Tokens that inputs are looked at on, and the memory that they may take: blocks are gone through in groups of it.
_TOKENS = 4096
_BYTES = 2**30


@dataclass(frozen=True)
class Spared:
    """What was taken out of an adapter.

    Attributes:
        directions: How many of a layer's directions of input, the median over layers that the rows reach, 0 to 1.
        energy: How much of the sum of ||B A||_F^2 over all adapted layers, 0 to 1.
    """

    directions: float
    energy: float


def require(method: TrainedMethod, crew: Crew) -> None:
    """Refuse a run that has no inputs to spare, or no process that could look at them.

    Raises:
        UsageError: The method has no retain rows, or the model is cut over processes.
    """
    if "retain" not in method.sets():
        raise UsageError(
            f"--spare leaves the inputs of retain rows alone, and {method.title} has none; leave it out"
        )
    if crew.sharded:
        raise UsageError(
            "--spare needs the whole model in every process; start without FSDP, or leave it out"
        )


@torch.no_grad()
def spare(model: nn.Module, rows: Sequence[Example], share: float, *, seed: int) -> Spared:
    """Take out of every A what it does along the leading directions of its inputs on rows, in float64.

    Args:
        model: With an adapter of PEFT; on any device, whole.
        rows: Tokenised; as many are drawn by the seed as have 4096 tokens, prompt and response alike.
        share: Of the energy that the directions carry, above 0 and below 1.
        seed: Draws the rows.
    """
    shares, taken = [], 0.0
    before = math.fsum(
        _energy(_factor(one, "B"), _factor(one)) for one in model.modules() if _is_adapted(one)
    )
    for names, basis in directions(model, rows, share, seed=seed):
        for name in names:
            down, up = (_factor(model.get_submodule(name), factor) for factor in "AB")
            wide, away = down.double(), basis.to(down.device)
            along = wide @ away
            down.copy_(wide - along @ away.T)
            shares.append(basis.shape[1] / basis.shape[0])
            taken += _energy(up, along)
    return Spared(median(shares), taken / before if before else 0.0)


def _energy(up: Tensor, down: Tensor) -> float:
    """||up down||_F^2 of (out, rank) and (rank, n), in float64, without their product."""
    left, right = up.double(), down.double()
    return float(((left.T @ left) * (right @ right.T)).sum())


def directions(
    model: nn.Module, rows: Sequence[Example], share: float, *, seed: int
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The leading directions of what a model's adapted layers get as input, its adapter doing nothing meanwhile.

    Yields:
        Names of layers that are given the same tensor, and their Q, (in, m), orthonormal, float64.
    """
    found, chosen = blocks.find(model), _sample(rows, seed)
    names = {id(module): name for name, module in model.named_modules() if _is_adapted(module)}
    parts = [
        {names[id(module)]: module for module in layer.modules() if id(module) in names}
        for layer in found.layers
    ]
    last = max(index for index, part in enumerate(parts) if part)
    for begin, end in _groups(parts[: last + 1]):
        watched = {name: module for part in parts[begin:end] for name, module in part.items()}
        with blocks.shortened(found, end):
            seen = _inputs(model, watched, chosen)
        for alike, inputs in seen:
            yield alike, leading(inputs, share)


def leading(inputs: Tensor, share: float) -> Tensor:
    """The fewest right singular vectors of (tokens, in) that carry a share of the energy: (in, m), float64."""
    wide = inputs.double()
    few = wide.shape[0] < wide.shape[1]
    chosen = carrying(wide @ wide.T if few else wide.T @ wide, share)
    # From left singular vectors to right ones; QR takes out what squaring the singular values cost.
    return torch.linalg.qr(wide.T @ chosen)[0] if few else chosen


def carrying(moment: Tensor, share: float) -> Tensor:
    """The fewest eigenvectors of a second moment, (n, n), that carry a share of its trace: (n, m), float64."""
    values, vectors = torch.linalg.eigh(moment.double())
    energy = values.flip(0).clamp_min(0).cumsum(0)
    count = 0 if share <= 0 else int((energy < share * energy[-1]).sum()) + 1
    return vectors.flip(1)[:, :count]


def _sample(rows: Sequence[Example], seed: int) -> list[Example]:
    chosen: list[Example] = []
    for place in drawn(len(rows), 0, len(rows), seed, "spared"):
        if sum(len(row.tokens) for row in chosen) >= _TOKENS:
            break
        chosen.append(rows[place])
    return chosen


def _is_adapted(module: nn.Module) -> bool:
    return "default" in getattr(module, "lora_A", {})


def _factor(module: nn.Module, factor: str = "A") -> Tensor:
    """A of an adapted layer, (rank, in), or B, (out, rank)."""
    factors: Any = getattr(module, f"lora_{factor}")
    weight: Tensor = factors["default"].weight
    return weight


def _groups(parts: Sequence[Mapping[str, nn.Module]]) -> Iterator[tuple[int, int]]:
    """Runs of blocks whose inputs fit into memory together, at least one block each."""
    begin, held = 0, 0
    for index, part in enumerate(parts):
        own = sum(4 * _TOKENS * _factor(module).shape[1] for module in part.values())
        if index > begin and held + own > _BYTES:
            yield begin, index
            begin, held = index, 0
        held += own
    yield begin, len(parts)


@torch.no_grad()
def _inputs(
    model: Any, watched: Mapping[str, nn.Module], rows: Sequence[Example]
) -> list[tuple[tuple[str, ...], Tensor]]:
    """What layers get as input on the rows' tokens, float32; layers that are given the same tensor together."""
    device = next(model.parameters()).device
    given: dict[str, Tensor] = {}
    seen: dict[tuple[str, ...], list[Tensor]] = {}
    with _noted(watched, given), perturb.evaluating(model), model.disable_adapter():
        for row in rows:
            # One by one: what an expert gets says no more of which tokens are padding.
            batch = padded([row], 0, device)
            model(input_ids=batch.tokens, attention_mask=batch.attended, use_cache=False, logits_to_keep=1)
            alike: dict[int, list[str]] = {}
            for name, tensor in given.items():
                alike.setdefault(id(tensor), []).append(name)
            for names in alike.values():
                tensor = given[names[0]]
                seen.setdefault(tuple(names), []).append(tensor.reshape(-1, tensor.shape[-1]).float())
            given.clear()
    return [(together, torch.cat(tensors)) for together, tensors in seen.items()]


@contextmanager
def _noted(watched: Mapping[str, nn.Module], given: dict[str, Tensor]) -> Iterator[None]:
    """A block in which each forward pass leaves what the layers were given."""

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given[name] = inputs[0]

    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in watched.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
