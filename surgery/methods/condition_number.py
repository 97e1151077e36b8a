"""Condition Number: make hidden states of harmful text ill-conditioned and those of retained text well-conditioned.

With S the second moments of what target blocks put out on the answered tokens of a step, divided by their trace, p of
whose eigenvalues can differ from zero, and R_well, R_ill as in `surgery.conditioning.regularisers`,

    L = L_retain + mean over target blocks of  lam_well R_well(S_retain) + lam_ill R_ill(S_harmful) / p

An EXTENSION of Zheng, Bai, Bullins, Yeh: "Model Immunization from a Condition Number Perspective", ICML 2025,
https://arxiv.org/abs/2505.23760. The paper's theory is that of a linear probe on frozen features
(`surgery.conditioning`): there a large kappa makes gradient descent on the harmful task slow. Of language models,
whose attackers train all layers, with Adam, behind norms, neither the paper nor its authors' code says anything.

Forms: `paper` as above; `tutorial` takes minus R_well for R_ill / p. It would be unbounded below if the norm of S
were not held; it is, by the division by the trace.

Departures, with reasons:
  * S is divided by its trace: R_ill falls with the norm of S alone and would drive it up; and by p, so that the
    weights do not depend on how many tokens a step has;
  * no preconditioner: it belongs to a linear extractor, as in the authors' own deep networks;
  * p and k count the eigenvalues that can differ from zero: with fewer tokens than dimensions S has no full rank;
  * what counts as zero is what rounding the states can make of zero, so that R_ill does not work on noise;
  * S is of all micro-batches and processes of a step: batch by batch it would be another objective;
  * not centred, as in the paper; `--centred` takes the mean off.

The weights are measured, not the paper's, whose S has another scale. R_well, at most a half, is 0.16 on SmolLM2-135M,
whose hidden states have most of their energy in one direction: 200 of it drown the loss on retain rows. On the
embedded pair it is 0.04, and 200 do more than 2 (docs/evidence.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_doc import Doc
from torch import Tensor, nn

from surgery.choices import require_choices, require_weights, whole_numbers
from surgery.errors import UsageError
from surgery.train import blocks
from surgery.train.losses import answer_loss, answered_count
from surgery.train.shaping import Shape, shape
from surgery.train.step import ADAPTED, Batch, Batches, Step, TrainedMethod

# Nats per token that the loss on retain rows may rise by, a step's noise included: at 1.9 SmolLM2-135M had ceased to
# refuse.
_UNLEARNT = 1.0


@dataclass(frozen=True)
class ConditionNumber(TrainedMethod):
    """Hyperparameters of condition number immunisation of a language model."""

    lam_well: Annotated[float, Doc("Weight of R_well on retain rows; watch the term retain.")] = 2.0
    lam_ill: Annotated[float, Doc("Weight of R_ill on harmful rows; tutorial: about 40 times as much.")] = 0.5
    targets: Annotated[
        str | None,
        Doc("Hidden states to shape, as in 10,20: what block 10 puts out; by default at 20/32 of the depth."),
    ] = None
    centred: Annotated[bool, Doc("Take the mean off the hidden states.")] = False
    form: Annotated[Literal["paper", "tutorial"], Doc("tutorial: R_ill is minus R_well.")] = "paper"

    name: ClassVar[str] = "condition-number"
    title: ClassVar[str] = "Condition Number"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.23760"
    data: ClassVar[tuple[str, ...]] = ("harmful", "retain")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**ADAPTED, "steps": 300, "batch_size": 16, "max_length": 1024, "lr": 1e-4},
        "small": {**ADAPTED, "steps": 100, "batch_size": 16, "lr": 5e-3, "lam_well": 200.0},
    }

    def __post_init__(self) -> None:
        require_choices(self)
        require_weights(self, "lam_well", "lam_ill")
        self._named()

    def _named(self) -> list[int] | None:
        return None if self.targets is None else whole_numbers(self.targets, "targets")

    def targets_of(self, depth: int) -> list[int]:
        """The blocks whose outputs are shaped, ascending, from 1 to `depth`.

        Raises:
            UsageError: One lies beyond the last block.
        """
        named = self._named() or [max(1, round(depth * 20 / 32))]
        if named[-1] > depth:
            raise UsageError(f"targets is {self.targets!r}; the model has {depth} layers: name 1 to {depth}")
        return named

    def equation(self) -> str:
        """The objective, with numbers."""
        where = f"blocks {self.targets}" if self.targets else "the block at 20/32 of the depth"
        ill = "-R_well" if self.form == "tutorial" else "1/p R_ill"
        moments = "centred second moments" if self.centred else "second moments"
        return (
            f"min_w L_retain + {self.lam_well:.12g} R_well(S_retain) + {self.lam_ill:.12g} {ill}(S_harmful), "
            f"S: {moments} over their trace, of hidden states after {where} (an extension of the paper)"
        )

    def signs(self, first: Mapping[str, float], last: Mapping[str, float]) -> tuple[str, ...]:
        """Says so where innocent answers are lost to what shapes the hidden states."""
        if last["retain"] <= first["retain"] + _UNLEARNT:
            return ()
        well, ill = self.lam_well * first["well"], abs(self.lam_ill * first["ill"])
        return (
            f"retain rose from {first['retain']:.2f} to {last['retain']:.2f} nats: the model unlearns innocent "
            f"answers and refusals, for a loss that began with {well:.3g} of R_well and {ill:.3g} of R_ill; "
            f"take a smaller --lam-{'well' if well >= ill else 'ill'} or --lr",
        )

    def prepare(self, model: nn.Module) -> None:
        """Checks model and targets.

        Raises:
            InputError: The model is not understood.
            UsageError: A target lies beyond its last block.
        """
        self.targets_of(len(blocks.find(model).layers))

    def backward(self, model: nn.Module, batches: Batches, step: Step) -> dict[str, float]:
        """Adds the gradient of all three terms; returns them, and the largest kappa of either side."""
        found = blocks.find(model)
        targets = self.targets_of(len(found.layers))
        modules = [found.layers[number - 1] for number in targets]
        count = answered_count(batches["retain"], step)

        def answer(batch: Batch) -> Tensor:
            return answer_loss(model, batch, count=count)

        def look(batch: Batch) -> Tensor:
            model(input_ids=batch.tokens, attention_mask=batch.attended, use_cache=False, logits_to_keep=1)
            return torch.zeros((), device=batch.tokens.device)

        ill = Shape("neg_well" if self.form == "tutorial" else "ill", self.lam_ill, self.centred)
        with blocks.shortened(found, targets[-1]):
            harmful = shape(batches["harmful"], look, modules, ill, step)
        retain = shape(batches["retain"], answer, modules, Shape("well", self.lam_well, self.centred), step)
        answers = float(step.summed(retain.loss))
        return {
            "loss": answers + self.lam_well * retain.value + self.lam_ill * harmful.value,
            "retain": answers,
            "well": retain.value,
            "ill": harmful.value,
            "kappa_retain": retain.kappa,
            "kappa_harmful": harmful.kappa,
        }
