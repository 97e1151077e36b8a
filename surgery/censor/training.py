"""Meta-learned adversarial censoring: learn a desired task so that the encoder is hard to teach a harmful one.

With theta the encoder, w_d and w_h the heads, and theta_k, w_k what K steps of a simulated attacker make of
theta, w_h:

    theta, w_d  descend  L_d(theta, w_d) - H,       H = 1/K sum over k = 1..K of l(theta_k, w_k)
    w_h, rate   descend  H

H is measured on examples that no step of the attacker sees, and differentiated through all steps (Adam, its gradient
cut to a norm of 100). l is the calibrated cross-entropy, to which a clamped one may be added: raw cross-entropy has
no upper bound, and is raised most by exchanging labels, which one step of an attacker undoes. K = 0 is the paper's
baseline, adversarial censoring: l at theta itself.

Henderson, Mitchell, Manning, Jurafsky, Finn: "Self-Destructing Models", AIES 2023, https://arxiv.org/abs/2211.14946.

Departures from the authors' code, with reasons:
  * the mean is over k = 1..K, as in the paper; the code counts the unattacked encoder too;
  * raw cross-entropy is clamped at log C for each example, as it diverges otherwise;
  * the head that the attacker begins with is learned for every encoder; the code learns it for the toy alone and
    means to for BERT (`learned_head=False` draws one for each step, as it does there);
  * a constant of 1e-16 stands under Adam's root; theirs masks derivatives that are not finite;
  * its further terms (gradient norm, mutual information, masked tokens) are off in all its runs, and left out;
  * the last weights are kept, not those of the best validation: the caller sees what is kept.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from surgery.censor.examples import Draw, Examples
from surgery.censor.model import TwoTasks, head
from surgery.errors import OutputError, UsageError
from surgery.train.calibration import calibrated_loss
from surgery.train.seeding import seeded
from surgery.train.unrolled import Adam, trajectory

_ENCODER = "encoder."
_HEAD = "harmful"


@dataclass(frozen=True)
class Censoring:
    """Hyperparameters; the defaults are the paper's for BERT-tiny.

    Attributes:
        steps: Outer steps.
        lr: Of the encoder and the desired head (Adam).
        batch_size: Examples of the desired task a step, and of the harmful one held out from the attacker.
        clip: Norm to which the gradient of an outer step is cut.
        inner_steps: K; 0 is adversarial censoring.
        inner_batch_sizes: What the size of each of the attacker's batches is drawn from.
        inner_clip: Norm to which the attacker's gradient is cut.
        inner_eps: Added to the root in the attacker's Adam.
        rate: The attacker's first learning rate.
        rates: Range of that rate.
        meta_lr: Of the attacker's rate and first head (Adam).
        learned_head: Whether the attacker's first head is learned, not drawn anew for each step.
        calibrated: Weight of the calibrated harmful loss.
        clamped: Weight of the harmful cross-entropy clamped at log C.
        first_order: Whether second derivatives are left out.
    """

    steps: int = 50_000
    lr: float = 1e-5
    batch_size: int = 20
    clip: float = 10.0
    inner_steps: int = 16
    inner_batch_sizes: tuple[int, ...] = (12, 24, 48)
    inner_clip: float = 100.0
    inner_eps: float = 1e-8
    rate: float = 3e-4
    rates: tuple[float, float] = (1e-6, 1e-2)
    meta_lr: float = 1e-4
    learned_head: bool = True
    calibrated: float = 1.0
    clamped: float = 0.0
    first_order: bool = False

    def __post_init__(self) -> None:
        for option in ("steps", "inner_steps", "lr", "meta_lr", "calibrated", "clamped"):
            value = getattr(self, option)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{option} is {value}; it must be a finite number of at least 0")
        for option in ("batch_size", "clip", "inner_clip"):
            if not getattr(self, option) > 0:
                raise UsageError(f"{option} is {getattr(self, option)}; it must be more than 0")
        if not self.inner_batch_sizes or min(self.inner_batch_sizes) < 1:
            raise UsageError(
                f"inner_batch_sizes is {self.inner_batch_sizes}; it must list sizes of at least 1"
            )
        if not 0 < self.rates[0] <= self.rate <= self.rates[1]:
            raise UsageError(f"rate is {self.rate}; it must lie in {self.rates}, and that above 0")


@dataclass(frozen=True)
class Batches:
    """Examples of one outer step.

    Attributes:
        desired: To learn the desired task on.
        lessons: What each step of the attacker learns from.
        held_out: To measure the harmful loss on.
    """

    desired: Examples
    lessons: tuple[Examples, ...]
    held_out: Examples


@dataclass(frozen=True)
class Round:
    """What an outer step saw, in nats.

    Attributes:
        desired: L_d.
        harmful: H.
        first: The harmful loss after the attacker's first step; at theta if it takes none.
        last: The same after its last.
        rate: The attacker's learning rate in this step.
    """

    desired: float
    harmful: float
    first: float
    last: float
    rate: float


@dataclass(frozen=True)
class Harm:
    """H and its derivatives.

    Attributes:
        losses: The harmful loss after each of the attacker's steps; at theta if it takes none.
        gradients: By encoder weight (`encoder.NAME`), and of the head it begins with (`harmful`).
        slope: With respect to the attacker's rate.
    """

    losses: tuple[float, ...]
    gradients: Mapping[str, Tensor]
    slope: Tensor


def censor(model: TwoTasks, draw: Draw, censoring: Censoring, *, seed: int = 0) -> list[Round]:
    """What every outer step saw; the model is trained in place, and left in the mode it was in.

    Args:
        model: An encoder with its heads.
        draw: Gives examples; an attacker's and those to measure it on must be drawn apart, so from many.
        censoring: Hyperparameters.
        seed: Of what is drawn.

    Raises:
        OutputError: A gradient is not finite.
    """
    rate = torch.tensor(censoring.rate, dtype=model.harmful.dtype, device=model.harmful.device)
    kept = [*model.encoder.parameters(), model.desired]
    defender = torch.optim.Adam(kept, lr=censoring.lr)
    attacker = torch.optim.Adam([model.harmful, rate], lr=censoring.meta_lr)
    mode, history = model.training, []
    model.train()
    with torch.random.fork_rng(devices=[]):
        for number in range(censoring.steps):
            source = torch.Generator().manual_seed(seeded(seed, "censoring", number))
            torch.manual_seed(seeded(seed, "dropout", number))
            batches = drawn(draw, censoring, source)
            if not censoring.learned_head:
                _redraw(model.harmful, source)
            history.append(gradients(model, rate, batches, censoring))
            norm = nn.utils.clip_grad_norm_(kept, censoring.clip)
            if not bool(norm.isfinite()):
                raise OutputError(
                    f"the gradient of outer step {number} is {float(norm)}; lower lr or meta_lr"
                )
            defender.step()
            attacker.step()
            with torch.no_grad():
                rate.clamp_(*censoring.rates)
    model.train(mode)
    model.zero_grad(set_to_none=True)
    return history


def drawn(draw: Draw, censoring: Censoring, source: torch.Generator) -> Batches:
    """The examples of one outer step, all drawn at once so that a finite set gives none of them twice."""
    which = torch.randint(len(censoring.inner_batch_sizes), (censoring.inner_steps,), generator=source)
    sizes = [censoring.inner_batch_sizes[one] for one in which.tolist()]
    outer = [censoring.batch_size, censoring.batch_size]
    parts, rows = [], draw(sum(outer + sizes), source)
    for size in outer + sizes:
        parts.append(rows[:size])
        rows = rows[size:]
    return Batches(parts[0], tuple(parts[2:]), parts[1])


def gradients(model: TwoTasks, rate: Tensor, batches: Batches, censoring: Censoring) -> Round:
    """What this step sees; sets the gradients, each so that descent is what its owner wants.

    Args:
        model: Gets gradients of `L_d - H` on encoder and desired head, of `H` on the harmful head.
        rate: The attacker's rate, which gets that of `H`.
        batches: Examples of this step.
        censoring: Hyperparameters.
    """
    model.zero_grad(set_to_none=True)
    desired = cross_entropy(model(batches.desired.inputs), batches.desired.desired)
    desired.backward()
    found = harm(model, rate, batches, censoring)
    for name, weight in model.encoder.named_parameters():
        raised = found.gradients[_ENCODER + name]
        weight.grad = -raised if weight.grad is None else weight.grad - raised
    model.harmful.grad, rate.grad = found.gradients[_HEAD], found.slope
    losses = found.losses
    return Round(float(desired.detach()), sum(losses) / len(losses), losses[0], losses[-1], float(rate))


def harm(model: TwoTasks, rate: Tensor, batches: Batches, censoring: Censoring) -> Harm:
    """The mean harmful loss along the attack, and its derivatives in what the attack began with and in its rate."""
    start = {_ENCODER + name: weight for name, weight in model.encoder.named_parameters()}
    start[_HEAD] = model.harmful
    length = rate.detach().clone().requires_grad_()

    def learn(weights: Mapping[str, Tensor], number: int) -> Tensor:
        lesson = batches.lessons[number]
        return cross_entropy(harmful_logits(model, weights, lesson.inputs), lesson.harmful)

    path = trajectory(
        learn,
        start,
        len(batches.lessons),
        Adam(eps=censoring.inner_eps),
        length,
        exact=not censoring.first_order,
        clip=censoring.inner_clip,
    )
    points = path if batches.lessons else [start]
    held_out = batches.held_out
    measured = (
        (
            weights,
            harmful_loss(harmful_logits(model, weights, held_out.inputs), held_out.harmful, censoring),
        )
        for weights in points
    )
    way = _carried if censoring.first_order and batches.lessons else _through
    return way(start, length, measured, max(len(batches.lessons), 1))


def harmful_logits(
    model: TwoTasks, weights: Mapping[str, Tensor], inputs: Tensor
) -> Float[Tensor, "rows classes"]:
    """Logits of the harmful task with an encoder and a head of these weights."""
    encoder = {
        name.removeprefix(_ENCODER): weight for name, weight in weights.items() if name.startswith(_ENCODER)
    }
    return functional_call(model.encoder, encoder, (inputs,)) @ weights[_HEAD].T


def harmful_loss(
    logits: Float[Tensor, "rows classes"], targets: Int[Tensor, " rows"], censoring: Censoring
) -> Float[Tensor, ""]:
    """The bounded loss that is raised, from 0 to log C for a weight of 1."""
    # With both weights 0, plain training, there is still something to differentiate.
    total = 0.0 * logits.sum()
    if censoring.calibrated:
        total = total + censoring.calibrated * calibrated_loss(logits, targets, tolerance=1e-6)
    if censoring.clamped:
        each = cross_entropy(logits, targets, reduction="none").clamp(max=math.log(logits.shape[-1]))
        total = total + censoring.clamped * each.mean()
    return total


Measured = Iterable[tuple[Mapping[str, Tensor], Tensor]]
"""The attacker's weights at each point that counts, and the harmful loss there."""


def _through(start: Mapping[str, Tensor], rate: Tensor, measured: Measured, points: int) -> Harm:
    """Derivatives through all of the attacker's steps."""
    losses = torch.stack([loss for _, loss in measured])
    found = torch.autograd.grad(
        losses.sum() / points, [*start.values(), rate], allow_unused=True, materialize_grads=True
    )
    return Harm(tuple(losses.tolist()), dict(zip(start, found[:-1], strict=True)), found[-1])


def _carried(start: Mapping[str, Tensor], rate: Tensor, measured: Measured, points: int) -> Harm:
    """Derivatives at each point, as if the attacker's steps were constants."""
    total = {name: torch.zeros_like(weight) for name, weight in start.items()}
    slope, losses = torch.zeros_like(rate), []
    for weights, loss in measured:
        found = torch.autograd.grad(
            loss / points, list(weights.values()), allow_unused=True, materialize_grads=True
        )
        losses.append(float(loss.detach()))
        for (name, weight), one in zip(weights.items(), found, strict=True):
            total[name] += one
            slope += (one * (weight - start[name])).sum().detach() / rate.detach()
    return Harm(tuple(losses), total, slope)


def _redraw(weight: nn.Parameter, source: torch.Generator) -> None:
    with torch.no_grad():
        weight.copy_(head(weight.shape[1], weight.shape[0], source))
