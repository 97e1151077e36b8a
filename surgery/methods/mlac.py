"""MLAC: train so that K steps of harmful fine-tuning, whatever their rate, leave the harmful loss high.

With theta_k the weights after k steps of a simulated attacker, L_d the loss of what is desired and L_h that of
harmful answers on rows no attacker sees,

    min_theta  L_d(theta) - lam * (1/K) sum_{k=1..K} L_h(theta_k(theta, rate))

The derivative goes through the attacker's steps (second order), or with `--first-order` is taken at each theta_k as
if at theta. The attacker's rate is learned against the defender: it goes down the harmful term that theta goes up.

Henderson, Mitchell, Manning, Jurafsky, Finn: "Self-Destructing Models: Increasing the Costs of Harmful Dual Uses of
Foundation Models", AIES 2023, https://arxiv.org/abs/2211.14946, and the authors' code.

Forms: `paper` as above; `tutorial` raises the harmful loss after the last step alone, subject to L_d <= epsilon, by a
multiplier that grows while that is violated.

L_h is bounded: the authors' calibrated loss over label tokens where `--labels` names some, else cross-entropy cut at
log V. For classifiers with heads of their own, the paper's setting, see `surgery.censor`.

Departures from the authors' code, with reasons:
  * one language model has no heads of its own for either task: what the attacker learns beside its steps is its rate;
  * L_d is the mean of the cross-entropies of aligned and of retain answers;
  * the calibration of a whole vocabulary is no size one can solve, so it is over label tokens or not at all;
  * the mean is over theta_1 to theta_K as printed, not with theta_0, which their code adds;
  * Adam's constant is 1e-4 and stands under the root: with 1e-8 the derivative of a step in a gradient near 0, as
    that of all A of a LoRA at B = 0, is 1e8, and such weights alone would make the exact gradient.

K = 0 is their baseline without an attacker (AC).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_doc import Doc
from torch import nn

from surgery.choices import require_choices
from surgery.errors import UsageError
from surgery.train import blocks, censoring, held_out
from surgery.train.bounded import Bound
from surgery.train.censoring import Inner
from surgery.train.step import Batches, Step, Stream, TrainedMethod, batch_by_batch


@dataclass(frozen=True)
class MLAC(TrainedMethod):
    """Hyperparameters of MLAC; the defaults are the paper's for its classifier."""

    inner_steps: Annotated[int, Doc("Steps of the simulated attacker; 0 raises the harmful loss itself.")] = (
        16
    )
    lam: Annotated[float, Doc("Weight of the harmful loss.")] = 1.0
    inner_lr: Annotated[float, Doc("The attacker's learning rate at first.")] = 3e-4
    inner_eps: Annotated[
        float, Doc("Gradient of a weight below which the attacker's Adam moves it less than its rate.")
    ] = 1e-4
    inner_lr_step: Annotated[
        float, Doc("Learning rate of the attacker's learning rate; 0 leaves it as it is.")
    ] = 1e-4
    first_order: Annotated[bool, Doc("No derivative through the attacker's steps; far less memory.")] = False
    labels: Annotated[
        str | None, Doc("Ids of 2 to 16 label tokens, as 11,42, whose calibrated loss is the harmful one.")
    ] = None
    bound: Annotated[
        Literal["auto", "calibrated", "entropy", "clamped"],
        Doc("How the harmful loss is bounded; auto: calibrated with --labels, else clamped."),
    ] = "auto"
    epsilon: Annotated[
        float | None,
        Doc(
            "Bound of the desired loss, in the form of the tutorial; by default 0.1 above what it is at first."
        ),
    ] = None
    multiplier_step: Annotated[
        float, Doc("Growth of the multiplier for each nat above epsilon, in the form of the tutorial.")
    ] = 1.0
    form: Annotated[
        Literal["paper", "tutorial"],
        Doc("tutorial: the last step's harmful loss, the desired one bounded."),
    ] = "paper"

    name: ClassVar[str] = "mlac"
    title: ClassVar[str] = "MLAC"
    paper: ClassVar[str] = "https://arxiv.org/abs/2211.14946"
    data: ClassVar[tuple[str, ...]] = ("aligned", "harmful", "retain")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "steps": 50_000,
            "batch_size": 20,
            "max_length": 200,
            "lr": 1e-5,
            "schedule": "constant",
            "warmup": 0.0,
            "weight_decay": 0.0,
            "clip": 10.0,
        },
        "paper-adapter": {"lr": 1e-4},
        "small": {
            "inner_steps": 8,
            "inner_lr": 3e-3,
            "steps": 20,
            "batch_size": 8,
            "lr": 1e-3,
            "clip": 10.0,
        },
        "small-adapter": {"lr": 5e-3, "lora_rank": 16, "lora_alpha": 32},
    }

    def __post_init__(self) -> None:
        require_choices(self)
        self._require("inner_steps", self.inner_steps >= 0, "at least 0")
        for option in ("lam", "inner_lr_step", "multiplier_step"):
            self._require(option, 0 <= getattr(self, option) < math.inf, "a finite number of at least 0")
        for option in ("inner_lr", "inner_eps"):
            self._require(option, 0 < getattr(self, option) < math.inf, "a finite number above 0")
        if self.epsilon is not None:
            self._require("epsilon", 0 <= self.epsilon < math.inf, "a finite number of at least 0")
        if self.bound == "calibrated" and self.labels is None:
            raise UsageError("bound is calibrated, which needs label tokens; name them by --labels")
        if self.bound in ("entropy", "clamped") and self.labels is not None:
            raise UsageError(f"--labels and --bound {self.bound} contradict each other; give one of them")
        self.label_tokens()

    def _require(self, option: str, holds: bool, what: str) -> None:
        if not holds:
            raise UsageError(f"{option.replace('_', '-')} is {getattr(self, option)}; it must be {what}")

    def label_tokens(self) -> tuple[int, ...]:
        """The label tokens; none where none are named.

        Raises:
            UsageError: They are no 2 to 16 different ids.
        """
        if self.labels is None:
            return ()
        parts = self.labels.split(",")
        ids = tuple(int(part) for part in parts) if all(part.strip().isdecimal() for part in parts) else ()
        if len(set(ids)) != len(parts) or not 2 <= len(ids) <= 16:
            raise UsageError(f"labels is {self.labels!r}; it must be 2 to 16 different ids, as in 11,42")
        return ids

    def bounded_by(self) -> Bound:
        """How the harmful loss is bounded."""
        if self.bound != "auto":
            return self.bound
        return "calibrated" if self.labels else "clamped"

    def equation(self) -> str:
        """The objective, with numbers."""
        order = "first order" if self.first_order else "second order"
        harmful = f"{self.bounded_by()} L_harmful"
        rate = f"attacker's rate from {self.inner_lr:.12g}" + ", learned" * (self.inner_lr_step > 0)
        if self.form == "tutorial":
            bound = "epsilon" if self.epsilon is None else f"{self.epsilon:.12g}"
            return (
                f"max_w {harmful}(w_{self.inner_steps}) subject to L_desired(w) <= {bound}, {order}; {rate}"
            )
        mean = f"mean_(k=1..{self.inner_steps}) {harmful}(w_k)" if self.inner_steps else f"{harmful}(w)"
        return f"min_w L_desired(w) - {self.lam:.12g} {mean}, {order}; {rate}"

    def streams(self, rows: Mapping[str, Sequence[Any]], seed: int) -> dict[str, Stream]:
        """Aligned and retain rows, harmful rows for the attacker, and others to measure on.

        Raises:
            InputError: The harmful rows have fewer than two prompts.
        """
        seen, unseen = held_out.split(rows["harmful"], seed)
        attack = {"attack": Stream(seen, self.inner_steps)} if self.inner_steps else {}
        return {
            "aligned": Stream(rows["aligned"]),
            "retain": Stream(rows["retain"]),
            "held_out": Stream(unseen),
            **attack,
        }

    def prepare(self, model: nn.Module) -> None:
        """Checks the model.

        Raises:
            InputError: Its blocks cannot be found.
            UsageError: It computes activations again, which the exact derivative cannot go through.
        """
        blocks.find(model)
        again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        if again and not self.first_order:
            raise UsageError(
                "--gradient-checkpointing and the exact derivative exclude each other; add --first-order"
            )

    def backward(self, model: nn.Module, batches: Batches, step: Step) -> dict[str, float]:
        """Adds the gradient; moves the attacker's rate.

        Returns:
            The loss and its parts: L_d, the harmful loss (mean, and after the last step), the attacker's own loss at
            its first and last step, its rate, and the multiplier of the tutorial's form.

        Raises:
            ResourceError: The exact derivative needs more memory than there is.
            UsageError: Several processes were to take the exact derivative.
        """
        rate = float(step.memory.setdefault("rate", self.inner_lr))
        lessons = batch_by_batch(batches["attack"], self.inner_steps) if self.inner_steps else []
        last = self.form == "tutorial"
        desired = self._desired(model, batches, step)
        multiplier = self._multiplier(desired, step) if last else 1.0
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.mul_(multiplier)
        inner = Inner(rate, self.inner_eps, self.bounded_by(), self.label_tokens(), last)
        lam = 1.0 if last else self.lam
        ascend = censoring.first_order if self.first_order else censoring.exact
        found, slope = ascend(model, lessons, batches["held_out"], inner, lam, step)
        if self.inner_lr_step > 0 and self.inner_steps:
            censoring.learn_rate(step.memory, slope, self.inner_lr_step)
        loss = multiplier * desired - lam * found["harmful"]
        extra = {"multiplier": multiplier} if last else {}
        return {"loss": loss, "desired": desired, **found, "rate": rate, **extra}

    def _desired(self, model: nn.Module, batches: Batches, step: Step) -> float:
        """Adds the gradient of L_d; its value over all processes."""
        return sum(censoring.descend(model, batches[name], step, share=0.5) for name in ("aligned", "retain"))

    def _multiplier(self, desired: float, step: Step) -> float:
        """The multiplier of this step; grown by what L_d is above its bound, for the next."""
        memory = step.memory
        bound = memory.setdefault("epsilon", desired + 0.1) if self.epsilon is None else self.epsilon
        now = float(memory.setdefault("multiplier", 1.0))
        memory["multiplier"] = max(0.0, now + self.multiplier_step * (desired - bound))
        return now
