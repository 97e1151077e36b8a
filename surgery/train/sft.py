"""Plain supervised fine-tuning: what the methods are measured against.

minimise  L(theta; D_aligned),  L the mean cross-entropy of the response's tokens
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from surgery.train.losses import answer_loss, answered_count
from surgery.train.step import Batches, Step, TrainedMethod


@dataclass(frozen=True)
class SFT(TrainedMethod):
    """One pass, one loss, no hyperparameters of its own."""

    name: ClassVar[str] = "sft"
    title: ClassVar[str] = "SFT"
    paper: ClassVar[str] = ""
    data: ClassVar[tuple[str, ...]] = ("aligned",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {"steps": 60, "batch_size": 16, "max_length": 96, "lr": 2e-3}
    }

    def equation(self) -> str:
        """What is minimised."""
        return "min L(theta; D_aligned)"

    def prepare(self, model: nn.Module) -> None:
        """Nothing to check and nothing to freeze."""
        del model

    def backward(self, model: nn.Module, batches: Batches, step: Step) -> dict[str, float]:
        """Adds the gradient of the mean cross-entropy; returns it as `loss`."""
        count = answered_count(batches["aligned"], step)
        parts = []
        for batch in batches["aligned"]:
            loss = answer_loss(model, batch, count=count)
            step.backward(loss)
            parts.append(loss.detach())
        return {"loss": float(step.summed(torch.stack(parts).sum()))}
