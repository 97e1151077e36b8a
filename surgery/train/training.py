"""How to train, as against what for: the options that all training methods share."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_doc import Doc

from surgery.choices import NEGATABLE, require_choices
from surgery.errors import UsageError

SMALL_MODEL = 50_000_000
"""Parameters below which a model gets the preset `small`."""


@dataclass(frozen=True)
class Training:
    """Options of the training loop; a method's presets give values of their own to some of them."""

    steps: Annotated[int, Doc("Steps of the optimiser.")] = 200
    batch_size: Annotated[
        int, Doc("Rows of one step, over all processes and micro-batches, from each data set.")
    ] = 8
    max_length: Annotated[int, Doc("Tokens of a row; a longer response is cut.")] = 512
    lr: Annotated[float, Doc("Learning rate at its highest.")] = 1e-3
    schedule: Annotated[
        Literal["cosine", "constant"], Doc("What the learning rate does after the warm-up.")
    ] = "cosine"
    warmup: Annotated[float, Doc("Share of the steps over which the learning rate rises, 0 to 1.")] = 0.1
    weight_decay: Annotated[float, Doc("AdamW's weight decay.")] = 0.0
    clip: Annotated[float, Doc("Norm to which the gradient of a step is clipped.")] = 1.0
    lora_rank: Annotated[int, Doc("Rank of the adapter.")] = 8
    lora_alpha: Annotated[float, Doc("Scale of the adapter: its update is multiplied by alpha / rank.")] = (
        16.0
    )
    lora_dropout: Annotated[float, Doc("Dropout before the adapter, 0 to 1.")] = 0.0
    lora_targets: Annotated[
        str | None,
        Doc(
            "Names of the linear layers that get the adapter, as q_proj,v_proj; by default all of a block's."
        ),
    ] = None
    spare: Annotated[
        float,
        Doc(
            "Share of the energy of the retain rows' inputs whose directions the finished adapter leaves alone, 0 to "
            "1; 0: none."
        ),
    ] = 0.0
    full: Annotated[bool, Doc("Train all weights, not an adapter."), NEGATABLE] = False
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Doc("Of the forward pass; what is trained is held in float32. auto: bfloat16 on a GPU that has it."),
    ] = "auto"
    gradient_accumulation: Annotated[
        int, Doc("Micro-batches into which a process cuts its rows of a step, to save memory.")
    ] = 1
    gradient_checkpointing: Annotated[
        bool, Doc("Compute activations again in the backward pass, to save memory.")
    ] = False
    checkpoint_every: Annotated[int, Doc("Steps after which what a resumed run needs is saved.")] = 50
    keep_adapter: Annotated[bool, Doc("Keep the adapter beside the output, in OUT-adapter.")] = False
    track: Annotated[
        str | None, Doc("Log the terms of the loss to one of accelerate's trackers, as tensorboard.")
    ] = None

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("steps", "batch_size", "gradient_accumulation", "checkpoint_every", "lora_rank"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("max_length", self.max_length >= 2, "at least 2")
        for name in ("lr", "clip", "lora_alpha"):
            self._require(name, 0 < getattr(self, name) < float("inf"), "a number above 0")
        for name in ("warmup", "lora_dropout", "spare"):
            self._require(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        self._require("weight_decay", 0 <= self.weight_decay < float("inf"), "0 or above")
        if self.full and self.lora_targets is not None:
            raise UsageError("--full trains all weights, --lora-targets an adapter; give one of them")
        if self.full and self.spare:
            raise UsageError("--full trains all weights, --spare an adapter; give one of them")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise UsageError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be {what}")
