"""The harmful loss along an attack, raised: the gradient with respect to the weights that the attack began with.

Both ways take the same steps (Adam without decay, the gradient cut to a norm of 100): `exact` differentiates through
them, `first_order` adds up what is found at each point.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery import resources
from surgery.errors import ResourceError, UsageError
from surgery.train import adversaries, unrolled
from surgery.train.adversaries import Adversary
from surgery.train.bounded import Bound, Measure, label_loss, processes, token_loss
from surgery.train.losses import answer_loss, answered_count
from surgery.train.step import Batch, Step

# The authors' limit of an attacker's gradient, and the range of its rate.
CLIP = 100.0
RATES = (1e-6, 1e-2)
_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Inner:
    """What the simulated attacker does and how its success is measured.

    Attributes:
        rate: Its learning rate.
        eps: The constant of its Adam.
        bound: How the harmful loss is bounded.
        labels: The label tokens of a calibrated loss.
        last: Whether the harmful loss counts after the last step alone, not as the mean over all.
    """

    rate: float
    eps: float
    bound: Bound
    labels: tuple[int, ...]
    last: bool

    def shares(self, steps: int) -> dict[int, float]:
        """The weight of the harmful loss after each number of steps at which it counts."""
        if self.last or not steps:
            return {steps: 1.0}
        return dict.fromkeys(range(1, steps + 1), 1 / steps)

    def measures(self, batches: Sequence[Batch], step: Step) -> list[Measure]:
        """This process's parts of the harmful loss, each a function of a model."""
        if self.bound != "calibrated":
            return token_loss(batches, self.bound, answered_count(batches, step))
        if processes(step, batches[0].tokens.device) > 1:
            raise UsageError("a calibrated loss is computed by one process; leave out --labels, or start one")
        return [label_loss(batches, self.labels)]


Found = tuple[dict[str, float], float]
"""The terms for the log, and the derivative of the harmful loss with respect to the attacker's rate."""


def descend(model: nn.Module, batches: Sequence[Batch], step: Step, *, share: float) -> float:
    """Adds the gradient of a share of the cross-entropy of answers; its value over all processes."""
    count, parts = answered_count(batches, step), []
    for batch in batches:
        loss = share * answer_loss(model, batch, count=count)
        step.backward(loss)
        parts.append(loss.detach().double())
    return float(step.summed(torch.stack(parts).sum()))


def first_order(
    model: nn.Module,
    lessons: Sequence[Sequence[Batch]],
    held_out: Sequence[Batch],
    inner: Inner,
    lam: float,
    step: Step,
) -> Found:
    """Adds `-lam` times the gradient of the harmful loss at every point of the attack that counts.

    Args:
        model: In training.
        lessons: The micro-batches of every step of the attacker.
        held_out: Micro-batches to measure on.
        inner: The attacker.
        lam: Weight of the harmful loss.
        step: Adds up over processes.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    present: list[Tensor | None] = [None] * len(weights)
    adversaries.gather(weights, present)
    raised: list[Tensor | None] = [None] * len(weights)
    measures, shares = inner.measures(held_out, step), inner.shares(len(lessons))
    harmful, learned = [], []
    slope = torch.zeros((), dtype=torch.float64, device=held_out[0].tokens.device)
    attacker = Adversary(inner.rate, 0, False, 0, decay=0.0, clip=CLIP, eps=inner.eps)
    with step.parked(), adversaries.attacking(model, weights, attacker, step) as attack:
        for taken in range(len(lessons) + 1):
            if taken:
                learned.append(attack.learn(lessons[taken - 1]))
            if taken not in shares:
                continue
            parts = []
            for measure in measures:
                part = measure(model)
                step.backward(-lam * shares[taken] * part)
                parts.append(part.detach().double())
            harmful.append(torch.stack(parts).sum())
            slope = slope + attack.along() / inner.rate
            adversaries.gather(weights, raised)
    adversaries.give_back(weights, present)
    adversaries.give_back(weights, raised)
    lam_slope = -float(step.summed(slope)) / lam if lam else 0.0
    return _terms(harmful, shares, learned, step), lam_slope


def exact(
    model: nn.Module,
    lessons: Sequence[Sequence[Batch]],
    held_out: Sequence[Batch],
    inner: Inner,
    lam: float,
    step: Step,
) -> Found:
    """Adds `-lam` times the gradient of the harmful loss, through all steps of the attacker; arguments as above.

    Raises:
        ResourceError: The graph of all steps needs more memory than there is.
        UsageError: Several processes train.
    """
    device = held_out[0].tokens.device
    if processes(step, device) > 1:
        raise UsageError("the exact derivative is taken by one process; add --first-order, or start one")
    start = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    measures, shares = inner.measures(held_out, step), inner.shares(len(lessons))
    rate = torch.tensor(inner.rate, device=device, requires_grad=True)
    learned: list[Tensor] = []

    def loss(weights: Mapping[str, Tensor], number: int) -> Tensor:
        count = answered_count(lessons[number], step)
        parts = [answer_loss(_at(model, weights), batch, count=count) for batch in lessons[number]]
        learned.append(torch.stack(parts).sum().detach().double())
        return torch.stack(parts).sum()

    def harmful_along(steps: int) -> list[Tensor]:
        adam = unrolled.Adam(inside=inner.eps**2)
        path = unrolled.trajectory(loss, start, steps, adam, rate, clip=CLIP)
        points = {0: start} if not steps else dict(enumerate(path, 1))
        return [
            torch.stack([measure(_at(model, weights)) for measure in measures]).sum()
            for taken, weights in points.items()
            if taken in shares or steps < len(lessons)
        ]

    # Kernels of fused attention have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        if lessons and not step.memory.get("planned"):
            _require_memory(lambda: harmful_along(1), len(lessons), device)
            step.memory["planned"] = True
            learned.clear()
        harmful = harmful_along(len(lessons))
        total = torch.stack([share * one for share, one in zip(shares.values(), harmful, strict=True)]).sum()
        step.backward(-lam * total)
    slope = 0.0 if rate.grad is None or not lam else -float(rate.grad) / lam
    return _terms([one.detach().double() for one in harmful], shares, learned, step), slope


def learn_rate(memory: MutableMapping[str, Any], slope: float, size: float) -> None:
    """Move the attacker's rate down the harmful loss by a step of Adam, within its range.

    Args:
        memory: Holds `rate`, and the moments.
        slope: Derivative of the harmful loss with respect to the rate.
        size: Learning rate of the rate.
    """
    taken = memory.get("rate_steps", 0) + 1
    first = _BETAS[0] * memory.get("rate_first", 0.0) + (1 - _BETAS[0]) * slope
    second = _BETAS[1] * memory.get("rate_second", 0.0) + (1 - _BETAS[1]) * slope**2
    mean, square = first / (1 - _BETAS[0] ** taken), second / (1 - _BETAS[1] ** taken)
    rate = memory["rate"] - size * mean / (square**0.5 + 1e-8)
    memory.update(rate_steps=taken, rate_first=first, rate_second=second)
    memory["rate"] = min(max(rate, RATES[0]), RATES[1])


def _at(model: nn.Module, weights: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The model at other weights, as a call."""
    return lambda **inputs: functional_call(model, dict(weights), (), inputs)


def _terms(
    harmful: Sequence[Tensor], shares: Mapping[int, float], learned: Sequence[Tensor], step: Step
) -> dict[str, float]:
    mean = torch.stack([share * one for share, one in zip(shares.values(), harmful, strict=True)]).sum()
    ends = [learned[0], learned[-1]] if learned else [torch.zeros_like(mean)] * 2
    values = step.summed(torch.stack([mean, harmful[-1], *ends])).tolist()
    return dict(zip(("harmful", "harmful_end", "attacker", "attacker_end"), values, strict=True))


def _require_memory(one_step: Callable[[], list[Tensor]], steps: int, device: torch.device) -> None:
    """Refuse an attack whose graph does not fit, from what the graph of one step of it holds."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = one_step()
    needed = sum(sizes.values()) * (steps + 1)
    del held
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else resources.memory_available()
    if needed > free:
        raise ResourceError(
            f"the derivative through {steps} steps needs about {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB "
            "are free; add --first-order, or lower --inner-steps, --batch-size or --max-length"
        )
